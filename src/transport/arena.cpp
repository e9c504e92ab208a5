#include "transport/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <utility>

#include "core/error.h"

namespace paracomm {
namespace {

constexpr size_t kGrain = 64 * 1024;

/// As much as the machine has: pages cost nothing before they are touched.
size_t arena_bytes() {
  const auto pages = static_cast<size_t>(std::max(sysconf(_SC_PHYS_PAGES), 1L));
  size_t nbytes = pages * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    nbytes = std::min<size_t>(nbytes, limit.rlim_cur / 64);  // every local peer maps it too
  return std::max<size_t>(nbytes / kGrain * kGrain, 64 * kGrain);
}

}  // namespace

Mapping::Mapping(Fd fd) : fd_(std::move(fd)) {
  struct stat info{};
  if (fstat(fd_.get(), &info) != 0) throw Error(ErrorKind::error, system_message("fstat of shared memory", errno));
  size_ = static_cast<size_t>(info.st_size);
  void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_.get(), 0);
  if (p == MAP_FAILED)
    throw Error(ErrorKind::error,
                system_message("mmap of " + std::to_string(size_) + " bytes of shared memory", errno));
  data_ = static_cast<std::byte*>(p);
}

Mapping::~Mapping() { munmap(data_, size_); }

std::shared_ptr<Mapping> map_shared(Fd fd) {
  static std::mutex mutex;
  static std::map<std::pair<dev_t, ino_t>, std::weak_ptr<Mapping>> known;
  struct stat info{};
  if (fstat(fd.get(), &info) != 0) throw Error(ErrorKind::error, system_message("fstat of shared memory", errno));
  const std::lock_guard lock(mutex);
  std::erase_if(known, [](const auto& entry) { return entry.second.expired(); });
  auto& entry = known[{info.st_dev, info.st_ino}];
  if (auto mapping = entry.lock()) return mapping;
  auto mapping = std::make_shared<Mapping>(std::move(fd));
  mapping->drop_fd();
  entry = mapping;
  return mapping;
}

Arena& Arena::process() {
  // Never destroyed: buffers may be released after static destruction began. A forked child makes its own.
  static std::atomic<Arena*> current{nullptr};
  Arena* arena = current.load(std::memory_order_acquire);
  while (arena == nullptr || arena->generation_ != fork_generation()) {
    std::unique_ptr<Arena> fresh(new Arena);
    if (current.compare_exchange_strong(arena, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
  }
  return *arena;
}

Arena::Arena() : generation_(fork_generation()) {
  const size_t nbytes = arena_bytes();
  mapping_ = std::make_unique<Mapping>(make_memfd("paracomm-arena", nbytes));
  free_[0] = nbytes;
}

void* Arena::allocate(size_t nbytes) {
  if (generation_ != fork_generation())
    throw Error(ErrorKind::error, "arena: a forked child cannot allocate from its parent's arena");
  const size_t need = (std::clamp<size_t>(nbytes, 1, mapping_->size()) + kGrain - 1) / kGrain * kGrain;
  const std::lock_guard lock(mutex_);
  for (auto it = free_.begin(); it != free_.end() && nbytes <= need; ++it) {
    if (it->second < need) continue;
    const auto [offset, size] = *it;
    free_.erase(it);
    if (size > need) free_[offset + need] = size - need;
    used_[offset] = need;
    return mapping_->data() + offset;
  }
  throw Error(ErrorKind::error,
              "arena: no " + std::to_string(nbytes) + " free bytes in " + std::to_string(mapping_->size()));
}

void Arena::release(void* p) noexcept {
  if (generation_ != fork_generation()) return;
  const std::lock_guard lock(mutex_);
  const auto used = used_.find(static_cast<size_t>(static_cast<std::byte*>(p) - mapping_->data()));
  if (used == used_.end()) return;
  auto [offset, size] = *used;
  used_.erase(used);
  fallocate(mapping_->fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
            static_cast<off_t>(size));
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + size == next->first) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += size;
      return;
    }
  }
  free_[offset] = size;
}

size_t Arena::bytes_in_use() const {
  const std::lock_guard lock(mutex_);
  size_t total = 0;
  for (const auto& [offset, size] : used_) total += size;
  return total;
}

}  // namespace paracomm
