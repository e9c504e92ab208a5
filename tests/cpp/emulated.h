// What the tests of emulated GPUs share.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cuda/emulator/control.h"

#define CUDA(call)                                                                                         \
  do {                                                                                                     \
    if (const cudaError_t cuda_error = (call); cuda_error != cudaSuccess)                                  \
      ::paracomm_test::fail(__FILE__, __LINE__, std::string(#call ": ") + cudaGetErrorString(cuda_error)); \
  } while (0)

namespace paracomm_test {

namespace emulator = paracomm::emulator;

/// Memory of the current device.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    CUDA(cudaMalloc(&data_, count * sizeof(T)));
    CUDA(cudaMemset(data_, 0, count * sizeof(T)));
    CUDA(cudaDeviceSynchronize());
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    CUDA(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { CUDA(cudaFree(data_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    CUDA(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

/// An independent stream of the current device.
class TestStream {
 public:
  TestStream() { CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, -1)); }
  ~TestStream() { CUDA(cudaStreamDestroy(stream_)); }
  TestStream(const TestStream&) = delete;
  TestStream& operator=(const TestStream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class TestEvent {
 public:
  TestEvent() { CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~TestEvent() { CUDA(cudaEventDestroy(event_)); }
  TestEvent(const TestEvent&) = delete;
  TestEvent& operator=(const TestEvent&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

template <class... Parameters>
void run_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                const std::type_identity_t<Parameters>&... arguments) {
  CUDA(emulator::launch(kernel, grid, block, 0, nullptr, arguments...));
  CUDA(cudaDeviceSynchronize());
}

/// Runs a kernel that is to fail on device 7, and checks what is reported.
template <class... Parameters>
void check_fails(cudaError_t error, const std::string& fragment, void (*kernel)(Parameters...), dim3 block,
                 const std::type_identity_t<Parameters>&... arguments) {
  CUDA(cudaSetDevice(7));
  CUDA(emulator::launch(kernel, 1, block, 0, nullptr, arguments...));
  CHECK_EQ(cudaDeviceSynchronize(), error);
  const std::string report = cudaGetErrorString(error);
  if (report.find(fragment) == std::string::npos)
    fail(__FILE__, __LINE__, "'" + report + "' does not contain '" + fragment + "'");
  // Every later call says the same, until the device is reset.
  void* pointer = nullptr;
  CHECK_EQ(cudaMalloc(&pointer, 16), error);
  emulator::reset_device(7);
  CUDA(cudaMalloc(&pointer, 16));
  CUDA(cudaFree(pointer));
  cudaGetLastError();
  CUDA(cudaSetDevice(0));
}

}  // namespace paracomm_test
