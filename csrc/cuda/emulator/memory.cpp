#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "core/error.h"
#include "core/fd.h"
#include "sanitizers.h"

namespace paracomm::emulator {
namespace {

constexpr uint64_t kMagic = 0x6563616d6172'6170;  // "parameca"
constexpr size_t kPage = 4096;
/// New memory holds garbage in its first bytes, where counters and flags lie: it is not zero on a GPU either.
constexpr int kGarbage = 0xcb;
constexpr size_t kGarbageBytes = 64 << 10;

struct Record {
  Memory memory;
  Fd file;
  uint64_t inode = 0;  ///< of opened memory
  int opened = 1;
};

struct Registry {
  std::mutex mutex;
  std::map<const std::byte*, Record> records;  ///< by the first byte
};

// Kept for good: threads of streams may outlive main().
Registry& registry() {
  static Registry& registry = *new Registry;
  return registry;
}

size_t in_pages(size_t nbytes) { return (std::max<size_t>(nbytes, 1) + kPage - 1) / kPage * kPage; }

/// Maps the file (negative: no file) between two pages that nobody may touch. Null: no room.
std::byte* map(int file, size_t nbytes) {
  const size_t pages = in_pages(nbytes);
  void* room = ::mmap(nullptr, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  std::byte* base = static_cast<std::byte*>(room) + kPage;
  const int flags = MAP_FIXED | (file >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);
  if (::mmap(base, pages, PROT_READ | PROT_WRITE, flags, file, 0) == MAP_FAILED) {
    ::munmap(room, pages + 2 * kPage);
    return nullptr;
  }
  ::madvise(base, pages, MADV_DONTFORK);
  forbid(base + nbytes, pages - nbytes);
  return base;
}

void unmap(const Memory& memory) {
  const size_t pages = in_pages(memory.nbytes);
  permit(memory.base, pages);
  ::munmap(memory.base - kPage, pages + 2 * kPage);
}

std::map<const std::byte*, Record>::iterator containing(Registry& all, const void* address) {
  const auto* byte = static_cast<const std::byte*>(address);
  auto after = all.records.upper_bound(byte);
  if (after == all.records.begin()) return all.records.end();
  const auto found = std::prev(after);
  return byte < found->first + found->second.memory.nbytes ? found : all.records.end();
}

uint64_t inode_of(int file) {
  struct stat facts{};
  return ::fstat(file, &facts) == 0 ? facts.st_ino : 0;
}

}  // namespace

void* Memories::allocate(MemoryKind kind, int device, size_t nbytes) {
  const Unobserved unobserved;
  Record record;
  if (kind == MemoryKind::device) try {
      record.file = make_memfd("paracomm-emulated-gpu", in_pages(nbytes));
    } catch (const Error&) {
      return nullptr;
    }
  std::byte* base = map(record.file.get(), nbytes);
  if (base == nullptr) return nullptr;
  std::memset(base, kGarbage, std::min(nbytes, kGarbageBytes));
  record.memory = {kind, device, base, nbytes};
  const std::lock_guard lock(registry().mutex);
  registry().records.emplace(base, std::move(record));
  return base;
}

bool Memories::release(MemoryKind kind, void* base) {
  const Unobserved unobserved;
  const std::lock_guard lock(registry().mutex);
  auto& records = registry().records;
  const auto found = records.find(static_cast<std::byte*>(base));
  if (found == records.end() || found->second.memory.kind != kind) return false;
  if (--found->second.opened > 0) return true;
  unmap(found->second.memory);
  records.erase(found);
  return true;
}

std::optional<Memory> Memories::find(const void* address) {
  const Unobserved unobserved;
  const std::lock_guard lock(registry().mutex);
  const auto found = containing(registry(), address);
  if (found == registry().records.end()) return std::nullopt;
  return found->second.memory;
}

std::optional<SharedMemory> Memories::share(const void* address) {
  const Unobserved unobserved;
  const std::lock_guard lock(registry().mutex);
  const auto found = containing(registry(), address);
  if (found == registry().records.end() || found->second.memory.kind != MemoryKind::device) return std::nullopt;
  const auto& [memory, file, inode, opened] = found->second;
  return SharedMemory{.magic = kMagic,
                      .inode = inode_of(file.get()),
                      .nbytes = memory.nbytes,
                      .process = ::getpid(),
                      .file = file.get(),
                      .device = memory.device};
}

void* Memories::open(const SharedMemory& shared) {
  const Unobserved unobserved;
  if (shared.magic != kMagic) return nullptr;
  const std::lock_guard lock(registry().mutex);
  for (auto& [base, record] : registry().records) {
    if (record.memory.kind != MemoryKind::opened || record.inode != shared.inode) continue;
    ++record.opened;
    return record.memory.base;
  }
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", shared.process, shared.file);
  Record record;
  record.file = Fd(::open(path, O_RDWR | O_CLOEXEC));
  // The owner may have ended, and another file or process may have its number.
  if (!record.file || inode_of(record.file.get()) != shared.inode) return nullptr;
  std::byte* base = map(record.file.get(), shared.nbytes);
  if (base == nullptr) return nullptr;
  record.inode = shared.inode;
  record.memory = {MemoryKind::opened, shared.device, base, shared.nbytes};
  registry().records.emplace(base, std::move(record));
  return base;
}

std::string Memories::describe(const void* address) {
  char offset[32];
  const std::optional<Memory> memory = find(address);
  if (!memory) {
    std::snprintf(offset, sizeof offset, "%p", address);
    return offset;
  }
  std::snprintf(offset, sizeof offset, " + %#zx",
                static_cast<size_t>(static_cast<const std::byte*>(address) - memory->base));
  switch (memory->kind) {
    case MemoryKind::device:
      return "memory of GPU " + std::to_string(memory->device) + offset;
    case MemoryKind::host:
      return std::string("host memory") + offset;
    case MemoryKind::opened:
      return "memory of another process's GPU " + std::to_string(memory->device) + offset;
  }
  return {};
}

}  // namespace paracomm::emulator
