// Errors, devices and their memory.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "control.h"
#include "core/fd.h"
#include "handles.h"
#include "memory.h"

namespace paracomm::emulator {
namespace {

using namespace api;

thread_local cudaError_t last_error = cudaSuccess;
thread_local int chosen_device = 0;

bool is_device(int device) { return device >= 0 && device < Gpu::count(); }

}  // namespace

cudaError_t readiness() {
  static const int generation = fork_generation();
  if (generation != fork_generation()) return cudaErrorInitializationError;
  if (Gpu::count() < 0) return cudaErrorInitializationError;
  return Gpu::count() == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

Gpu& current_gpu() { return Gpu::at(chosen_device); }

void fail_device(int device) { Gpu::at(device).fail(cudaErrorLaunchFailure, "which was made to fail"); }
void stall_device(int device, bool stalled) { Gpu::at(device).stall(stalled); }
void reset_device(int device) { Gpu::at(device).reset(); }
void set_patience(double seconds) { Gpu::set_patience(seconds); }

namespace api {
namespace {

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorDeviceUninitialized, "cudaErrorDeviceUninitialized", "invalid device context"},
    {cudaErrorMapBufferObjectFailed, "cudaErrorMapBufferObjectFailed", "mapping of buffer object failed"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchTimeout, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {cudaErrorPeerAccessAlreadyEnabled, "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge",
     "operation would result in a merge of separate capture "
     "sequences"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "capture was not ended in the same stream as it "
     "began"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing "
     "stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

/// Tells of the copy's ends whether they are memory of the kind that was said, all of it.
cudaError_t check_range(const void* address, size_t nbytes, bool on_device) {
  const std::optional<Memory> memory = Memories::find(address);
  const bool found = memory.has_value() && memory->kind != MemoryKind::host;
  if (on_device && !found) return cudaErrorInvalidValue;
  if (!on_device && found) return cudaErrorInvalidMemcpyDirection;
  if (memory && static_cast<const std::byte*>(address) + nbytes > memory->base + memory->nbytes)
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t check_copy(const void* to, const void* from, size_t nbytes, cudaMemcpyKind kind) {
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  const auto on_device = [&](const void* address, bool said) {
    if (kind != cudaMemcpyDefault) return said;
    const std::optional<Memory> memory = Memories::find(address);
    return memory.has_value() && memory->kind != MemoryKind::host;
  };
  const bool to_device = on_device(to, kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice);
  const bool from_device = on_device(from, kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice);
  if (const cudaError_t error = check_range(to, nbytes, to_device); error != cudaSuccess) return error;
  return check_range(from, nbytes, from_device);
}

}  // namespace

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  for (const ErrorText& known : kErrors)
    if (known.error == error) return known.name;
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error != cudaSuccess && readiness() == cudaSuccess && current_gpu().error() == error)
    return current_gpu().report();
  for (const ErrorText& known : kErrors)
    if (known.error == error) return known.text;
  return "unrecognized error code";
}

// --- devices ---

cudaError_t cudaGetDeviceCount(int* count) {
  return guarded([&] {
    *count = Gpu::count();
    return cudaSuccess;
  });
}

cudaError_t cudaSetDevice(int device) {
  return guarded([&] {
    if (!is_device(device)) return cudaErrorInvalidDevice;
    chosen_device = device;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return guarded([&] {
    *device = chosen_device;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return guarded([&] {
    if (!is_device(device)) return cudaErrorInvalidDevice;
    switch (attribute) {
      case cudaDevAttrMaxThreadsPerBlock:
        *value = Gpu::kThreadsPerBlock;
        return cudaSuccess;
      case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = static_cast<int>(Gpu::kSharedBytesPerBlock);
        return cudaSuccess;
      case cudaDevAttrWarpSize:
        *value = warpSize;
        return cudaSuccess;
      case cudaDevAttrMultiProcessorCount:
        *value = Gpu::kMultiprocessors;
        return cudaSuccess;
      case cudaDevAttrMaxThreadsPerMultiProcessor:
        *value = Gpu::kThreadsPerBlock * Gpu::kBlocksPerMultiprocessor;
        return cudaSuccess;
      case cudaDevAttrMaxBlocksPerMultiprocessor:
        *value = Gpu::kBlocksPerMultiprocessor;
        return cudaSuccess;
      case cudaDevAttrCanMapHostMemory:
      case cudaDevAttrUnifiedAddressing:
        *value = 1;
        return cudaSuccess;
      case cudaDevAttrComputeCapabilityMajor:
        *value = 9;
        return cudaSuccess;
      case cudaDevAttrComputeCapabilityMinor:
        *value = 0;
        return cudaSuccess;
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return guarded([&] {
    if (!is_device(device)) return cudaErrorInvalidDevice;
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "paracomm emulated GPU %d", device);
    properties->totalGlobalMem = size_t{1} << 34;
    properties->sharedMemPerBlock = Gpu::kSharedBytesPerBlock;
    properties->warpSize = warpSize;
    properties->maxThreadsPerBlock = Gpu::kThreadsPerBlock;
    properties->maxThreadsPerMultiProcessor = Gpu::kThreadsPerBlock * Gpu::kBlocksPerMultiprocessor;
    properties->maxBlocksPerMultiProcessor = Gpu::kBlocksPerMultiprocessor;
    properties->multiProcessorCount = Gpu::kMultiprocessors;
    properties->major = 9;
    properties->canMapHostMemory = properties->unifiedAddressing = 1;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return guarded_on_device([] {
    if (!Capture::allows_unsafe_call()) return cudaErrorStreamCaptureUnsupported;
    current_gpu().synchronize();
    return static_cast<cudaError_t>(current_gpu().error());
  });
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  return guarded([&] {
    if (!is_device(device) || !is_device(peer)) return cudaErrorInvalidDevice;
    *can = device != peer;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return guarded_on_device([&] {
    if (!is_device(peer) || peer == chosen_device) return cudaErrorInvalidDevice;
    if (flags != 0) return cudaErrorInvalidValue;
    return current_gpu().enable_peer(peer) ? cudaSuccess : cudaErrorPeerAccessAlreadyEnabled;
  });
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return guarded([&] {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
  });
}

// --- memory ---

cudaError_t cudaMalloc(void** pointer, size_t nbytes) {
  return guarded_on_device([&] {
    if (!Capture::allows_unsafe_call()) return cudaErrorStreamCaptureUnsupported;
    *pointer = nullptr;
    if (nbytes == 0) return cudaSuccess;
    *pointer = Memories::allocate(MemoryKind::device, chosen_device, nbytes);
    return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
  });
}

cudaError_t cudaFree(void* pointer) {
  return guarded([&] {
    if (pointer == nullptr) return cudaSuccess;
    if (!Capture::allows_unsafe_call()) return cudaErrorStreamCaptureUnsupported;
    const std::optional<Memory> memory = Memories::find(pointer);
    if (!memory || memory->kind != MemoryKind::device) return cudaErrorInvalidValue;
    Gpu::at(memory->device).synchronize();
    return Memories::release(MemoryKind::device, pointer) ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaHostAlloc(void** pointer, size_t nbytes, unsigned) {
  return guarded_on_device([&] {
    if (!Capture::allows_unsafe_call()) return cudaErrorStreamCaptureUnsupported;
    *pointer = Memories::allocate(MemoryKind::host, chosen_device, nbytes);
    return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
  });
}

cudaError_t cudaFreeHost(void* pointer) {
  return guarded([&] {
    if (pointer == nullptr) return cudaSuccess;
    if (!Capture::allows_unsafe_call()) return cudaErrorStreamCaptureUnsupported;
    const std::optional<Memory> memory = Memories::find(pointer);
    if (!memory || memory->kind != MemoryKind::host) return cudaErrorInvalidValue;
    Gpu::at(memory->device).synchronize();
    return Memories::release(MemoryKind::host, pointer) ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaHostGetDevicePointer(void** device_pointer, void* host_pointer, unsigned flags) {
  return guarded([&] {
    const std::optional<Memory> memory = Memories::find(host_pointer);
    if (flags != 0 || !memory || memory->kind != MemoryKind::host) return cudaErrorInvalidValue;
    *device_pointer = host_pointer;
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return guarded([&] {
    const std::optional<Memory> memory = Memories::find(pointer);
    void* const address = const_cast<void*>(pointer);
    if (!memory)
      *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, address};
    else if (memory->kind == MemoryKind::host)
      *attributes = {cudaMemoryTypeHost, memory->device, address, address};
    else
      *attributes = {cudaMemoryTypeDevice, memory->device, address, nullptr};
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind, cudaStream_t handle) {
  return guarded_on_device([&] {
    const std::shared_ptr<Stream> stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (nbytes == 0) return cudaSuccess;
    if (const cudaError_t error = check_copy(to, from, nbytes, kind); error != cudaSuccess) return error;
    const bool captured = stream->capture_point().capture != nullptr;
    // CUDA reads pageable memory before it returns, and returns when pageable memory was written.
    if (!captured && !Memories::find(from)) {
      std::vector<std::byte> staged(static_cast<const std::byte*>(from), static_cast<const std::byte*>(from) + nbytes);
      stream->submit([=, staged = std::move(staged)](Crew&) { std::memcpy(to, staged.data(), nbytes); });
    } else {
      stream->submit([=](Crew&) { std::memmove(to, from, nbytes); });
    }
    return !captured && !Memories::find(to) ? finish(*stream) : cudaSuccess;
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t nbytes, cudaMemcpyKind kind) {
  const cudaError_t error = cudaMemcpyAsync(to, from, nbytes, kind);
  return error != cudaSuccess ? error : cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t nbytes, cudaStream_t handle) {
  return guarded_on_device([&] {
    const std::shared_ptr<Stream> stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (nbytes == 0) return cudaSuccess;
    if (!Memories::find(to)) return cudaErrorInvalidValue;
    const cudaError_t error = check_range(to, nbytes, Memories::find(to)->kind != MemoryKind::host);
    if (error == cudaSuccess) stream->submit([=](Crew&) { std::memset(to, value, nbytes); });
    return error;
  });
}

cudaError_t cudaMemset(void* to, int value, size_t nbytes) { return cudaMemsetAsync(to, value, nbytes); }

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* pointer) {
  static_assert(sizeof(SharedMemory) <= sizeof(cudaIpcMemHandle_t));
  return guarded_on_device([&] {
    const std::optional<SharedMemory> shared = Memories::share(pointer);
    if (!shared) return cudaErrorInvalidValue;
    *handle = {};
    std::memcpy(handle->reserved, &*shared, sizeof *shared);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcOpenMemHandle(void** pointer, cudaIpcMemHandle_t handle, unsigned flags) {
  return guarded_on_device([&] {
    if (flags != cudaIpcMemLazyEnablePeerAccess) return cudaErrorInvalidValue;
    SharedMemory shared;
    std::memcpy(&shared, handle.reserved, sizeof shared);
    // A process cannot open what it shares itself.
    if (shared.process == ::getpid()) return cudaErrorDeviceUninitialized;
    *pointer = Memories::open(shared);
    return *pointer == nullptr ? cudaErrorMapBufferObjectFailed : cudaSuccess;
  });
}

cudaError_t cudaIpcCloseMemHandle(void* pointer) {
  return guarded([&] {
    const std::optional<Memory> memory = Memories::find(pointer);
    if (!memory || memory->kind != MemoryKind::opened) return cudaErrorInvalidValue;
    current_gpu().synchronize();
    return Memories::release(MemoryKind::opened, pointer) ? cudaSuccess : cudaErrorInvalidValue;
  });
}

}  // namespace api
}  // namespace paracomm::emulator
