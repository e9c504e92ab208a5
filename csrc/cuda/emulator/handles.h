// What the handles of the runtime API point to.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "graph.h"
#include "runtime_api.h"
#include "stream.h"

namespace paracomm::emulator::api {

struct CUstream_st {
  std::shared_ptr<Stream> stream;
};

/// What it stands for is replaced by each record.
struct CUevent_st {
  std::mutex mutex;
  std::shared_ptr<Stream> stream;  ///< null: never recorded
  uint64_t number = 0;             ///< of the stream's operation that is to be done
  CapturePoint capture;
};

struct CUgraph_st {
  std::shared_ptr<const Graph> graph;
};

struct CUgraphExec_st {
  /// One graph runs once at a time, whatever streams it is launched into.
  struct Runnable {
    std::shared_ptr<const Graph> graph;
    std::mutex running;
  };
  std::shared_ptr<Runnable> runnable;
};

}  // namespace paracomm::emulator::api

namespace paracomm::emulator {

/// The device of the calling thread.
Gpu& current_gpu();
/// Null: there is no such stream on the current device.
std::shared_ptr<Stream> stream_of(api::cudaStream_t handle);

/// Whether calls can be made at all: not in a forked child of a process that made some, nor without devices.
api::cudaError_t readiness();
api::cudaError_t remember(api::cudaError_t error);

/// Every call but the simplest: nothing throws out of it, and what goes wrong is remembered by cudaGetLastError.
template <class Call>
api::cudaError_t guarded(Call call) {
  api::cudaError_t error = readiness();
  if (error == api::cudaSuccess) try {
      error = call();
    } catch (const std::bad_alloc&) {
      error = api::cudaErrorMemoryAllocation;
    }
  return remember(error);
}

/// Likewise, for what needs the current device to work.
template <class Call>
api::cudaError_t guarded_on_device(Call call) {
  return guarded([&] {
    const int error = current_gpu().error();
    return error != 0 ? static_cast<api::cudaError_t>(error) : call();
  });
}

/// Waits for what the stream was given so far.
inline api::cudaError_t finish(const Stream& stream) {
  stream.wait(stream.submitted());
  return static_cast<api::cudaError_t>(stream.gpu().error());
}

}  // namespace paracomm::emulator
