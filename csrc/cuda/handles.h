// CUDA's resources as C++ objects, and its errors as ours.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cuda/namespace.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

inline void check(cudaError_t result, const std::string& what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // else the next call of somebody else reports it again
  throw Error(ErrorKind::error, what + ": " + cudaGetErrorString(result));
}

/// The calling thread's device, for a while.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice " + std::to_string(device));
    changed_ = before_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// What this thread does does not belong to a capture that goes on elsewhere, and does not spoil it.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Memory of the current device.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t nbytes) {
    check(cudaMalloc(&data_, nbytes > 0 ? nbytes : 1), "cudaMalloc of " + std::to_string(nbytes) + " bytes");
  }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceMemory() {
    if (data_ != nullptr) cudaFree(data_);
  }
  std::byte* data() const noexcept { return static_cast<std::byte*>(data_); }
  template <class T>
  T* as() const noexcept {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

/// The rows in the current device's memory. Blocks until they are there.
template <class Row>
DeviceMemory device_copy(const std::vector<Row>& rows, cudaStream_t stream) {
  const size_t nbytes = rows.size() * sizeof(Row);
  DeviceMemory memory(nbytes);
  check(cudaMemcpyAsync(memory.data(), rows.data(), nbytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return memory;
}

/// Host memory that devices see; zero at first.
template <class T>
class MappedHost {
 public:
  MappedHost() {
    void* host = nullptr;
    check(cudaHostAlloc(&host, sizeof(T), cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
    host_ = new (host) T{};
    void* device = nullptr;
    check(cudaHostGetDevicePointer(&device, host, 0), "cudaHostGetDevicePointer");
    device_ = static_cast<T*>(device);
  }
  ~MappedHost() { cudaFreeHost(host_); }
  MappedHost(const MappedHost&) = delete;
  MappedHost& operator=(const MappedHost&) = delete;
  T* operator->() const noexcept { return host_; }
  T* on_device() const noexcept { return device_; }

 private:
  T* host_ = nullptr;
  T* device_ = nullptr;
};

class Stream {
 public:
  /// Of the current device; it does not wait for the default stream.
  explicit Stream(bool urgent) {
    int lowest = 0, highest = 0;
    check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, urgent ? highest : lowest),
          "cudaStreamCreateWithPriority");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const noexcept { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  /// The stream goes on when what was recorded is complete.
  void hold(cudaStream_t stream) const { check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent"); }
  bool is_complete() const {
    const cudaError_t result = cudaEventQuery(event_);
    if (result == cudaErrorNotReady) return false;
    check(result, "a kernel on the device");
    return true;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

inline cudaStream_t stream_of(uintptr_t number) { return reinterpret_cast<cudaStream_t>(number); }

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
