// The memory of emulated GPUs, and what of the host's they may use.
//
// Device memory is an anonymous file that other processes can map. No name leads to it, and forked children neither map
// nor hold it: it is gone with the last process that uses it, however that ends. Unmapped pages lie on both sides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace paracomm::emulator {

enum class MemoryKind : uint8_t { device, host, opened };

struct Memory {
  MemoryKind kind = MemoryKind::device;
  int device = 0;
  std::byte* base = nullptr;
  size_t nbytes = 0;
};

/// What another process needs to map device memory, in the 64 bytes of a cudaIpcMemHandle_t.
struct SharedMemory {
  uint64_t magic = 0, inode = 0, nbytes = 0;
  int32_t process = 0, file = 0, device = 0, padding = 0;
};

/// All memory that this process allocated or opened. Any thread may call; ThreadSanitizer sees nothing of it.
class Memories {
 public:
  /// Null: there is no such memory left.
  static void* allocate(MemoryKind kind, int device, size_t nbytes);
  /// False: `base` is not the beginning of memory of this kind.
  static bool release(MemoryKind kind, void* base);
  /// The memory that the address lies in.
  static std::optional<Memory> find(const void* address);
  /// Empty: no device memory of ours.
  static std::optional<SharedMemory> share(const void* address);
  /// Where another process's memory lies here; the same place however often it is opened, until it was released as
  /// often. Null: its owner has freed it, ended, or does not let us see its files.
  static void* open(const SharedMemory& shared);
  /// "GPU 2 + 0x40", for reports.
  static std::string describe(const void* address);
};

}  // namespace paracomm::emulator
