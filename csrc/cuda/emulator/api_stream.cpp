// Streams, events, graphs, launches.
#include <new>
#include <utility>

#include "handles.h"

namespace paracomm::emulator {
namespace {

using namespace api;

bool is_default(cudaStream_t handle) { return handle == nullptr || handle == cudaStreamLegacy; }

/// Waits for nobody: whether a captured, failed or merely unfinished stream stands in the way.
cudaError_t failure_of(const Stream& stream) { return static_cast<cudaError_t>(stream.gpu().error()); }

CaptureMode mode_of(cudaStreamCaptureMode mode) {
  return mode == cudaStreamCaptureModeGlobal        ? CaptureMode::global
         : mode == cudaStreamCaptureModeThreadLocal ? CaptureMode::thread_local_
                                                    : CaptureMode::relaxed;
}

/// A call that has no place in a capture, on a stream that takes part in one.
bool spoils_capture(const Stream& stream) {
  const CapturePoint point = stream.capture_point();
  if (point.capture == nullptr) return false;
  point.capture->invalidate();
  return true;
}

cudaError_t create(cudaStream_t* handle, unsigned flags, int priority) {
  return guarded_on_device([&] {
    if (flags > cudaStreamNonBlocking) return cudaErrorInvalidValue;
    const auto kind = flags == cudaStreamNonBlocking ? Stream::Kind::independent : Stream::Kind::blocking;
    auto stream = std::make_shared<Stream>(current_gpu(), kind, std::min(0, std::max(-5, priority)));
    current_gpu().add(stream);
    *handle = new CUstream_st{std::move(stream)};
    return cudaSuccess;
  });
}

struct Recorded {
  std::shared_ptr<Stream> stream;
  uint64_t number;
  CapturePoint capture;
};
Recorded recorded(CUevent_st& event) {
  const std::lock_guard lock(event.mutex);
  return {event.stream, event.number, event.capture};
}

}  // namespace

std::shared_ptr<Stream> stream_of(cudaStream_t handle) {
  if (is_default(handle)) return current_gpu().default_stream();
  return &handle->stream->gpu() == &current_gpu() ? handle->stream : nullptr;
}

namespace api {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return create(stream, flags, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return create(stream, flags, priority);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return guarded([&] {
    if (is_default(handle)) return cudaErrorInvalidResourceHandle;
    handle->stream->close();
    delete handle;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return guarded([&] {
    const std::shared_ptr<Stream> stream = is_default(handle) ? current_gpu().default_stream() : handle->stream;
    if (spoils_capture(*stream)) return cudaErrorStreamCaptureUnsupported;
    return finish(*stream);
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return guarded([&] {
    const std::shared_ptr<Stream> stream = is_default(handle) ? current_gpu().default_stream() : handle->stream;
    if (spoils_capture(*stream)) return cudaErrorStreamCaptureUnsupported;
    if (const cudaError_t error = failure_of(*stream); error != cudaSuccess) return error;
    return stream->reached(stream->submitted()) ? cudaSuccess : cudaErrorNotReady;
  });
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  return guarded([&] {
    *priority = is_default(handle) ? 0 : handle->stream->priority();
    return cudaSuccess;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  return guarded([&] {
    if (event == nullptr || flags != 0) return cudaErrorInvalidValue;
    const std::shared_ptr<Stream> stream = is_default(handle) ? current_gpu().default_stream() : handle->stream;
    const Recorded what = recorded(*event);
    const CapturePoint here = stream->capture_point();
    if (what.capture.capture != nullptr) {
      if (stream->kind() == Stream::Kind::legacy) return cudaErrorStreamCaptureImplicit;
      if (!what.capture.capture->is_active()) return cudaErrorCapturedEvent;
      return stream->join(what.capture) ? cudaSuccess : cudaErrorStreamCaptureMerge;
    }
    if (here.capture != nullptr && what.stream != nullptr) {
      here.capture->invalidate();
      return cudaErrorStreamCaptureIsolation;
    }
    if (what.stream != nullptr && what.stream != stream && !what.stream->reached(what.number))
      stream->submit([what](Crew&) { what.stream->wait(what.number); });
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return guarded_on_device([&] {
    if ((flags & ~(cudaEventBlockingSync | cudaEventDisableTiming)) != 0) return cudaErrorInvalidValue;
    *event = new CUevent_st;
    return cudaSuccess;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return guarded([&] {
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    delete event;
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  return guarded_on_device([&] {
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    const std::shared_ptr<Stream> stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    CapturePoint capture = stream->capture_point();
    const std::lock_guard lock(event->mutex);
    event->stream = stream;
    event->number = stream->submitted();
    event->capture = std::move(capture);
    return cudaSuccess;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return guarded([&] {
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    const Recorded what = recorded(*event);
    if (what.capture.capture != nullptr) return cudaErrorCapturedEvent;
    if (!Capture::allows_unsafe_call()) return cudaErrorStreamCaptureUnsupported;
    if (what.stream == nullptr) return cudaSuccess;
    if (const cudaError_t error = failure_of(*what.stream); error != cudaSuccess) return error;
    return what.stream->reached(what.number) ? cudaSuccess : cudaErrorNotReady;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return guarded([&] {
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    const Recorded what = recorded(*event);
    if (what.capture.capture != nullptr) return cudaErrorCapturedEvent;
    if (!Capture::allows_unsafe_call()) return cudaErrorStreamCaptureUnsupported;
    if (what.stream == nullptr) return cudaSuccess;
    what.stream->wait(what.number);
    return failure_of(*what.stream);
  });
}

// --- graphs ---

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return guarded([&] {
    if (is_default(handle)) return cudaErrorStreamCaptureUnsupported;
    const auto capture = std::make_shared<Capture>(handle->stream, mode_of(mode));
    if (handle->stream->begin_capture(capture)) return cudaSuccess;
    capture->finish();
    return cudaErrorInvalidValue;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return guarded([&] {
    *graph = nullptr;
    const CapturePoint point = is_default(handle) ? CapturePoint{} : handle->stream->capture_point();
    if (point.capture == nullptr) return cudaErrorInvalidValue;
    if (point.capture->origin() != handle->stream.get()) return cudaErrorStreamCaptureUnmatched;
    if (!point.capture->may_end_here()) return cudaErrorStreamCaptureWrongThread;
    const bool joined = point.capture->is_joined(point.nodes), valid = point.capture->is_valid();
    auto captured = std::make_shared<const Graph>(point.capture->finish());
    if (!valid) return cudaErrorStreamCaptureInvalidated;
    if (!joined) return cudaErrorStreamCaptureUnjoined;
    *graph = new CUgraph_st{std::move(captured)};
    return cudaSuccess;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return guarded([&] {
    *status = cudaStreamCaptureStatusNone;
    if (is_default(handle)) return cudaSuccess;
    const CapturePoint point = handle->stream->capture_point();
    if (point.capture != nullptr)
      *status = point.capture->is_valid() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return guarded([&] {
    const CaptureMode before = Capture::exchange_thread_mode(mode_of(*mode));
    *mode = static_cast<cudaStreamCaptureMode>(before);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return guarded([&] {
    if (graph == nullptr) return cudaErrorInvalidValue;
    auto runnable = std::make_shared<CUgraphExec_st::Runnable>();
    runnable->graph = graph->graph;
    *exec = new CUgraphExec_st{std::move(runnable)};
    return cudaSuccess;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  return guarded_on_device([&] {
    if (exec == nullptr) return cudaErrorInvalidValue;
    const std::shared_ptr<Stream> stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    stream->submit([runnable = exec->runnable](Crew& crew) {
      const std::lock_guard lock(runnable->running);
      runnable->graph->run(crew);
    });
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return guarded([&] {
    delete graph;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return guarded([&] {
    delete exec;
    return cudaSuccess;
  });
}

}  // namespace api

// --- launches ---

cudaError_t launch_body(std::function<void()> body, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t handle) {
  return guarded_on_device([&] {
    const std::shared_ptr<Stream> stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    const Kernel kernel{std::move(body), grid, block, shared_bytes};
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (kernel.blocks() == 0 || threads == 0 || threads > Gpu::kThreadsPerBlock) return cudaErrorInvalidConfiguration;
    if (shared_bytes > Gpu::kSharedBytesPerBlock) return cudaErrorInvalidValue;
    stream->submit([kernel](Crew& crew) { crew.run(kernel); });
    return cudaSuccess;
  });
}

}  // namespace paracomm::emulator
