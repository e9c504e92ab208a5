// Plans that were made, by what they were made for.
#pragma once

#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "schedule/plan.h"

namespace paracomm {

struct Call;

class PlanCache {
 public:
  /// A Shape without window_bytes and lag comes in; the caller's function sets them.
  using Size = std::function<void(const Program&, Shape&)>;

  explicit PlanCache(Size size) : size_(std::move(size)) {}

  /// `idle`: nobody uses a plan that he does not own, so that old ones may be dropped. Throws Error(invalid_argument)
  /// where the elements do not divide into blocks, and what Plan throws.
  const std::shared_ptr<const Plan>& get(const Call& call, const Program& program, bool idle);

 private:
  struct Entry {
    int program;
    DType dtype;
    std::vector<size_t> blocks, output_blocks;
    size_t count, largest;
    std::shared_ptr<const Plan> plan;

    bool fits(const Call& call) const;
  };

  Size size_;
  std::unordered_multimap<size_t, Entry> entries_;
  const Entry* last_ = nullptr;
};

/// Mixes a value into a hash.
size_t mix(size_t hash, size_t value) noexcept;

}  // namespace paracomm
