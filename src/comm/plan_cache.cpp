#include "comm/plan_cache.h"

#include <string>

#include "comm/communicator.h"
#include "core/error.h"

namespace paracomm {
namespace {

constexpr size_t kPlans = 4096;  // in the cache

bool is_by_block(Collective collective) {
  return collective == Collective::all_gather || collective == Collective::gather ||
         collective == Collective::reduce_scatter || collective == Collective::scatter ||
         collective == Collective::all_to_all;
}

Shape shape_of(const Call& call, const Program& program) {
  Shape shape;
  shape.dtype = call.dtype;
  shape.output_blocks = call.output_blocks;
  if (!call.blocks.empty()) {
    shape.blocks = call.blocks;
    shape.largest_chunk = call.largest_block;
    return shape;
  }
  const auto n = static_cast<size_t>(is_by_block(program.collective) ? program.world_size : 1);
  if (call.count % n != 0)
    throw Error(ErrorKind::invalid_argument,
                std::to_string(call.count) + " elements do not divide into " + std::to_string(n) + " equal blocks");
  shape.blocks.assign(n, call.count / n);
  return shape;
}

}  // namespace

size_t mix(size_t hash, size_t value) noexcept { return (hash ^ value) * 0x9E3779B97F4A7C15ull + (hash >> 29); }

bool PlanCache::Entry::fits(const Call& call) const {
  return program == call.program && count == call.count && dtype == call.dtype && largest == call.largest_block &&
         blocks == call.blocks && output_blocks == call.output_blocks;
}

const std::shared_ptr<const Plan>& PlanCache::get(const Call& call, const Program& program, bool idle) {
  if (last_ != nullptr && last_->fits(call)) return last_->plan;
  size_t key = mix(mix(static_cast<size_t>(call.program), call.count), static_cast<size_t>(call.dtype));
  for (size_t block : call.blocks) key = mix(key, block);
  const auto [begin, end] = entries_.equal_range(key);
  for (auto it = begin; it != end; ++it)
    if (it->second.fits(call)) return (last_ = &it->second)->plan;
  if (entries_.size() >= kPlans && idle) {
    entries_.clear();
    last_ = nullptr;
  }
  Shape shape = shape_of(call, program);
  size_(program, shape);
  Entry entry{call.program,
              call.dtype,
              call.blocks,
              call.output_blocks,
              call.count,
              call.largest_block,
              std::make_shared<const Plan>(program, shape)};
  last_ = &entries_.emplace(key, std::move(entry))->second;
  return last_->plan;
}

}  // namespace paracomm
