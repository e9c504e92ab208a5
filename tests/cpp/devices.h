// Ranks with a device each, and collectives on them compared with the host executor bit by bit.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "cuda/device.h"
#include "worlds.h"

namespace paracomm_test {

inline DeviceOptions small_device() {
  DeviceOptions options;
  options.channels = 2;
  options.threads = 64;
  options.shot_blocks = 3;
  options.ring_bytes = 192 << 10;
  options.slice_bytes = 4 << 10;
  options.staging_bytes = 64 << 10;
  return options;
}

/// Threads of one process, with a device each.
struct DeviceWorld {
  explicit DeviceWorld(int n, const DeviceOptions& options = small_device(), CommOptions comm = small_windows())
      : comms(Communicator::local(n, comm)) {
    std::vector<std::string> cards;
    std::vector<std::shared_ptr<DeviceExecutor>> devices;
    for (int r = 0; r < n; ++r) {
      devices.push_back(emulated::make_device_executor(r, options, comms[static_cast<size_t>(r)]->device_hooks()));
      cards.push_back(devices.back()->publish());
    }
    for (size_t r = 0; r < devices.size(); ++r) {
      devices[r]->connect(cards);
      comms[r]->attach_device(devices[r]);
    }
  }
  ~DeviceWorld() {
    run_threads(static_cast<int>(comms.size()), [&](int rank) { comms[static_cast<size_t>(rank)]->close(); });
  }
  Communicator& operator[](int rank) { return *comms[static_cast<size_t>(rank)]; }

  Comms comms;
};

inline void check_cuda(cudaError_t result) {
  if (result != cudaSuccess) fail(__FILE__, __LINE__, cudaGetErrorString(result));
}

/// Device memory with bytes in it, `shift` bytes past an aligned address.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(const std::vector<std::byte>& bytes, size_t shift = 0) : nbytes_(bytes.size()), shift_(shift) {
    check_cuda(cudaMalloc(&base_, nbytes_ + shift + 16));
    if (nbytes_ > 0) check_cuda(cudaMemcpy(data(), bytes.data(), nbytes_, cudaMemcpyHostToDevice));
  }
  ~DeviceBuffer() { cudaFree(base_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return static_cast<std::byte*>(base_) + shift_; }
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> bytes(nbytes_);
    if (nbytes_ > 0) check_cuda(cudaMemcpy(bytes.data(), data(), nbytes_, cudaMemcpyDeviceToHost));
    return bytes;
  }

 private:
  size_t nbytes_, shift_;
  void* base_ = nullptr;
};

/// A rank's stream, on its device.
class DeviceStream {
 public:
  explicit DeviceStream(int device) {
    check_cuda(cudaSetDevice(device));
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~DeviceStream() { cudaStreamDestroy(stream_); }
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;
  operator cudaStream_t() const { return stream_; }
  uintptr_t number() const { return reinterpret_cast<uintptr_t>(stream_); }

 private:
  cudaStream_t stream_ = nullptr;
};

/// What one rank brings into a collective of any dtype, and how large its result is.
struct RankData {
  Call call;
  std::vector<std::byte> input, output;
  bool in_place = false;
};

}  // namespace paracomm_test
