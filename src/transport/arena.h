// Memory that peers on the same host map: one sparse anonymous file per process, mapped whole by every local peer once,
// so that handing out a buffer needs no peer's help. It has no name, so nothing can be left behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "core/fd.h"

namespace paracomm {

/// A shared mapping of a memfd.
class Mapping {
 public:
  /// Maps the whole file. Throws Error(error).
  explicit Mapping(Fd fd);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  /// Negative after drop_fd().
  int fd() const noexcept { return fd_.get(); }
  /// Gives the descriptor back; the memory stays mapped.
  void drop_fd() noexcept { fd_.reset(); }
  bool contains(const void* p, size_t nbytes) const noexcept {
    const auto* b = static_cast<const std::byte*>(p);
    return b >= data_ && b < data_ + size_ && nbytes <= static_cast<size_t>(data_ + size_ - b);
  }

 private:
  Fd fd_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// A peer's file may be mapped once for several communicators.
std::shared_ptr<Mapping> map_shared(Fd fd);

class Arena {
 public:
  /// The arena of this process, made on first use; not the parent's in a forked child.
  static Arena& process();

  /// Zeroed memory, aligned to a page. Throws Error(error) when the arena is full, or in a forked child (which shares
  /// the pages).
  void* allocate(size_t nbytes);
  /// Gives the pages back to the system. No-op in a forked child.
  void release(void* p) noexcept;

  const Mapping& mapping() const noexcept { return *mapping_; }
  bool contains(const void* p, size_t nbytes) const noexcept { return mapping_->contains(p, nbytes); }
  size_t bytes_in_use() const;

 private:
  Arena();

  std::unique_ptr<Mapping> mapping_;
  int generation_;
  mutable std::mutex mutex_;
  std::map<size_t, size_t> free_;  ///< offset -> bytes, never adjacent
  std::map<size_t, size_t> used_;
};

}  // namespace paracomm
