// What a rank tells its peers of its device memory, so that they can map it.
#pragma once

#include <string>
#include <vector>

#include "cuda/layout.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

struct Card {
  char magic[8];
  uint64_t process[2];  ///< a random number of the process, and its id
  int32_t device;       ///< as that process counts
  Layout layout;
  std::byte* memory;  ///< in that process
  cudaIpcMemHandle_t handle;

  static Card of(int device, const Layout& layout, std::byte* memory);
  /// Throws Error(mismatch) if it is no card of this kind of device.
  static Card parse(const std::string& text);
  std::string text() const { return {reinterpret_cast<const char*>(this), sizeof *this}; }

  /// Throws Error(mismatch) if the peer `who` was made with other options.
  void check_fits(const Layout& own, const std::string& who) const;
  /// The memory as `device` sees it. What has to be closed again is added to `opened`.
  std::byte* open(int device, std::vector<void*>& opened) const;
};

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
