// The runtime API of emulated GPUs: streams that really run beside the host, events, memory, processes, graphs,
// failures.
#include <cuda_runtime.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "emulated.h"
#include "ranks.h"

using namespace paracomm_test;

namespace {

// --- kernels ---

__global__ void await(const uint64_t* flag, uint64_t value) {
  while (emulator::load_acquire(flag) < value) {
  }
}
__global__ void raise(uint64_t* flag, uint64_t value) { emulator::store_release(flag, value); }
__global__ void fill(unsigned* out, unsigned value) { out[threadIdx.x] = value; }
__global__ void add(unsigned* out, unsigned value) { out[threadIdx.x] += value; }
__global__ void copy(unsigned* to, const unsigned* from) { to[threadIdx.x] = from[threadIdx.x]; }

/// A word that host and device see.
class HostFlag {
 public:
  HostFlag() {
    CUDA(cudaHostAlloc(&word_, sizeof *word_, cudaHostAllocMapped));
    *word_ = 0;
    CUDA(cudaHostGetDevicePointer(reinterpret_cast<void**>(&device_word_), word_, 0));
  }
  ~HostFlag() { CUDA(cudaFreeHost(word_)); }
  HostFlag(const HostFlag&) = delete;
  HostFlag& operator=(const HostFlag&) = delete;

  void set(uint64_t value) { __atomic_store_n(word_, value, __ATOMIC_RELEASE); }
  uint64_t* on_device() const { return device_word_; }

 private:
  uint64_t* word_ = nullptr;
  uint64_t* device_word_ = nullptr;
};

template <class Condition>
bool within(double seconds, Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// --- devices ---

void test_devices() {
  int count = 0, device = -1, value = 0;
  CUDA(cudaGetDeviceCount(&count));
  CHECK_EQ(count, 8);
  CHECK_EQ(cudaSetDevice(8), cudaErrorInvalidDevice);
  CHECK_EQ(cudaPeekAtLastError(), cudaErrorInvalidDevice);
  CHECK_EQ(cudaGetLastError(), cudaErrorInvalidDevice);
  CHECK_EQ(cudaGetLastError(), cudaSuccess);
  CUDA(cudaSetDevice(3));
  CUDA(cudaGetDevice(&device));
  CHECK_EQ(device, 3);
  std::thread([] {
    int chosen = -1;
    CUDA(cudaGetDevice(&chosen));
    CHECK_EQ(chosen, 0);  // a thread's own choice
  }).join();
  CUDA(cudaSetDevice(0));
  for (const cudaDeviceAttr attribute :
       {cudaDevAttrMaxThreadsPerBlock, cudaDevAttrMaxSharedMemoryPerBlock, cudaDevAttrWarpSize,
        cudaDevAttrMultiProcessorCount, cudaDevAttrCanMapHostMemory, cudaDevAttrMaxThreadsPerMultiProcessor,
        cudaDevAttrUnifiedAddressing, cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxBlocksPerMultiprocessor}) {
    CUDA(cudaDeviceGetAttribute(&value, attribute, 2));
    CHECK(value > 0);
  }
  CHECK_EQ(cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(120), 0), cudaErrorInvalidValue);
  cudaDeviceProp properties;
  CUDA(cudaGetDeviceProperties(&properties, 5));
  CHECK_EQ(std::string(properties.name), "paracomm emulated GPU 5");
  CUDA(cudaDeviceCanAccessPeer(&value, 0, 1));
  CHECK_EQ(value, 1);
  CUDA(cudaDeviceCanAccessPeer(&value, 1, 1));
  CHECK_EQ(value, 0);
  CUDA(cudaDeviceEnablePeerAccess(1, 0));
  CHECK_EQ(cudaDeviceEnablePeerAccess(1, 0), cudaErrorPeerAccessAlreadyEnabled);
  CHECK_EQ(cudaDeviceEnablePeerAccess(0, 0), cudaErrorInvalidDevice);
  CHECK_EQ(std::string(cudaGetErrorName(cudaErrorNotReady)), "cudaErrorNotReady");
  CHECK_EQ(std::string(cudaGetErrorString(cudaErrorNotReady)), "device not ready");
  cudaGetLastError();
}

// --- memory ---

void test_memory() {
  DeviceArray<unsigned> array(100);
  unsigned* const data = array.data();
  unsigned host[100] = {};
  CHECK_EQ(cudaMemcpy(host, data + 50, 51 * 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  CHECK_EQ(cudaMemcpy(host, data, 4, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  CHECK_EQ(cudaMemcpy(data, host, 4, cudaMemcpyDeviceToHost), cudaErrorInvalidMemcpyDirection);
  CHECK_EQ(cudaMemset(host, 0, 4), cudaErrorInvalidValue);
  CHECK_EQ(cudaFree(data + 1), cudaErrorInvalidValue);
  CHECK_EQ(cudaFree(host), cudaErrorInvalidValue);
  CHECK_EQ(cudaFreeHost(data), cudaErrorInvalidValue);
  CUDA(cudaFree(nullptr));
  host[3] = 7;
  CUDA(cudaMemcpy(data, host, sizeof host, cudaMemcpyDefault));
  CHECK_EQ(array.read()[3], 7u);

  cudaPointerAttributes attributes;
  CUDA(cudaPointerGetAttributes(&attributes, data + 5));
  CHECK_EQ(attributes.type, cudaMemoryTypeDevice);
  CHECK_EQ(attributes.device, 0);
  CUDA(cudaPointerGetAttributes(&attributes, host));
  CHECK_EQ(attributes.type, cudaMemoryTypeUnregistered);
  const HostFlag flag;
  CUDA(cudaPointerGetAttributes(&attributes, flag.on_device()));
  CHECK_EQ(attributes.type, cudaMemoryTypeHost);

  // Nothing is zero by itself, and nothing but allocations can be touched.
  unsigned char* fresh = nullptr;
  CUDA(cudaMalloc(&fresh, 1000));
  unsigned char first = 0;
  CUDA(cudaMemcpy(&first, fresh, 1, cudaMemcpyDeviceToHost));
  CHECK_EQ(static_cast<int>(first), 0xcb);
  CUDA(cudaFree(fresh));
  void* huge = &huge;
  CHECK_EQ(cudaMalloc(&huge, size_t{1} << 62), cudaErrorMemoryAllocation);
  CHECK(huge == nullptr);
  cudaGetLastError();
}

// --- streams ---

void test_asynchrony() {
  HostFlag flag;
  DeviceArray<unsigned> array(32);
  const TestStream stream;
  CUDA(emulator::launch(await, 1, 1, 0, stream, flag.on_device(), uint64_t{1}));
  CUDA(emulator::launch(fill, 1, 32, 0, stream, array.data(), 5u));
  CUDA(emulator::launch(add, 1, 32, 0, stream, array.data(), 1u));
  CUDA(cudaMemsetAsync(array.data() + 31, 0, sizeof(unsigned), stream));
  CHECK_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  flag.set(1);
  CUDA(cudaStreamSynchronize(stream));
  CUDA(cudaStreamQuery(stream));
  const std::vector<unsigned> values = array.read();
  CHECK_EQ(values[30], 6u);
  CHECK_EQ(values[31], 0u);
  cudaGetLastError();
}

/// The first kernel waits for what the second one, on another stream of the same device, does.
void test_streams_run_at_once() {
  DeviceArray<uint64_t> flag(1);
  const TestStream first, second;
  CUDA(emulator::launch(await, 1, 1, 0, first, flag.data(), uint64_t{1}));
  CUDA(emulator::launch(raise, 1, 1, 0, second, flag.data(), uint64_t{1}));
  CUDA(cudaStreamSynchronize(first));
  CUDA(cudaStreamSynchronize(second));
}

/// Pageable memory is read before the call returns; pinned memory when the stream gets there.
void test_copies() {
  HostFlag flag;
  DeviceArray<unsigned> array(1);
  const TestStream stream;
  unsigned pageable = 3;
  unsigned* pinned = nullptr;
  CUDA(cudaHostAlloc(&pinned, sizeof *pinned, cudaHostAllocDefault));
  CUDA(emulator::launch(await, 1, 1, 0, stream, flag.on_device(), uint64_t{1}));
  CUDA(cudaMemcpyAsync(array.data(), &pageable, sizeof pageable, cudaMemcpyHostToDevice, stream));
  CUDA(cudaMemcpyAsync(pinned, array.data(), sizeof pageable, cudaMemcpyDeviceToHost, stream));
  pageable = 4;
  *pinned = 9;
  flag.set(1);
  CUDA(cudaStreamSynchronize(stream));
  CHECK_EQ(*pinned, 3u);
  CUDA(cudaFreeHost(pinned));
}

void test_events() {
  HostFlag flag;
  DeviceArray<unsigned> array(32);
  const TestStream first, second;
  const TestEvent event;
  CUDA(cudaEventQuery(event));  // never recorded
  CUDA(emulator::launch(await, 1, 1, 0, first, flag.on_device(), uint64_t{1}));
  CUDA(emulator::launch(fill, 1, 32, 0, first, array.data(), 5u));
  CUDA(cudaEventRecord(event, first));
  CUDA(emulator::launch(await, 1, 1, 0, first, flag.on_device(), uint64_t{2}));  // not waited for
  CUDA(cudaStreamWaitEvent(second, event));
  CUDA(emulator::launch(add, 1, 32, 0, second, array.data(), 10u));
  CHECK_EQ(cudaEventQuery(event), cudaErrorNotReady);
  flag.set(1);
  CUDA(cudaEventSynchronize(event));
  CUDA(cudaEventQuery(event));
  CUDA(cudaStreamSynchronize(second));
  CHECK_EQ(cudaStreamQuery(first), cudaErrorNotReady);
  flag.set(2);
  CUDA(cudaStreamSynchronize(first));
  CHECK_EQ(array.read()[0], 15u);
  cudaGetLastError();
}

/// Blocking streams and the default stream wait for each other; independent streams do not.
void test_default_stream() {
  HostFlag flag;
  DeviceArray<unsigned> array(32);
  cudaStream_t blocking = nullptr;
  CUDA(cudaStreamCreateWithFlags(&blocking, cudaStreamDefault));
  const TestStream independent;
  CUDA(emulator::launch(await, 1, 1, 0, blocking, flag.on_device(), uint64_t{1}));
  CUDA(emulator::launch(fill, 1, 32, 0, cudaStreamLegacy, array.data(), 5u));
  CUDA(emulator::launch(add, 1, 32, 0, blocking, array.data(), 1u));
  CUDA(emulator::launch(add, 1, 32, 0, nullptr, array.data(), 1u));
  CUDA(cudaStreamSynchronize(independent));
  CHECK_EQ(cudaStreamQuery(nullptr), cudaErrorNotReady);
  flag.set(1);
  CUDA(cudaDeviceSynchronize());
  CHECK_EQ(array.read()[0], 7u);
  CUDA(cudaStreamDestroy(blocking));
  CHECK_EQ(cudaStreamDestroy(nullptr), cudaErrorInvalidResourceHandle);
  cudaGetLastError();
}

void test_wrong_launches() {
  DeviceArray<unsigned> array(32);
  const TestStream stream;
  CHECK_EQ(emulator::launch(fill, 1, 1025, 0, nullptr, array.data(), 1u), cudaErrorInvalidConfiguration);
  CHECK_EQ(emulator::launch(fill, 0, 32, 0, nullptr, array.data(), 1u), cudaErrorInvalidConfiguration);
  CHECK_EQ(emulator::launch(fill, 1, 32, 1 << 20, nullptr, array.data(), 1u), cudaErrorInvalidValue);
  CUDA(cudaSetDevice(1));
  CHECK_EQ(emulator::launch(fill, 1, 32, 0, stream, array.data(), 1u), cudaErrorInvalidResourceHandle);
  CUDA(cudaSetDevice(0));
  int priority = 0, least = 1, greatest = 1;
  CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  CHECK(least == 0 && greatest < 0);
  CUDA(cudaStreamGetPriority(stream, &priority));
  CHECK_EQ(priority, -1);
  cudaGetLastError();
}

/// Work that a destroyed stream was given is done all the same.
void test_destroyed_stream() {
  HostFlag flag;
  DeviceArray<uint64_t> done(1);
  cudaStream_t stream = nullptr;
  const TestEvent event;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA(emulator::launch(await, 1, 1, 0, stream, flag.on_device(), uint64_t{1}));
  CUDA(emulator::launch(raise, 1, 1, 0, stream, done.data(), uint64_t{4}));
  CUDA(cudaEventRecord(event, stream));
  CUDA(cudaStreamDestroy(stream));
  flag.set(1);
  CUDA(cudaEventSynchronize(event));
  CHECK_EQ(done.read()[0], uint64_t{4});
}

// --- graphs ---

/// What `submit` gives the stream, captured; null: the end of the capture failed with `expected`.
template <class Submit>
cudaGraphExec_t capture(cudaStream_t stream, Submit submit, cudaError_t expected = cudaSuccess,
                        cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  CUDA(cudaStreamBeginCapture(stream, mode));
  submit();
  CHECK_EQ(cudaStreamEndCapture(stream, &graph), expected);
  if (expected != cudaSuccess) return cudaGetLastError(), nullptr;
  CUDA(cudaGraphInstantiate(&exec, graph));
  CUDA(cudaGraphDestroy(graph));
  return exec;
}

void test_graphs() {
  DeviceArray<unsigned> array(32), other(32), result(64);
  const TestStream stream, side;
  const TestEvent fork, join;
  const cudaGraphExec_t exec = capture(stream, [&] {
    CUDA(emulator::launch(add, 1, 32, 0, stream, array.data(), 1u));
    CUDA(cudaEventRecord(fork, stream));
    CUDA(cudaStreamWaitEvent(side, fork));
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA(cudaStreamIsCapturing(side, &status));
    CHECK_EQ(status, cudaStreamCaptureStatusActive);
    CUDA(emulator::launch(copy, 1, 32, 0, side, other.data(), array.data()));
    CUDA(cudaEventRecord(join, side));
    CUDA(cudaMemcpyAsync(result.data(), array.data(), 32 * 4, cudaMemcpyDeviceToDevice, stream));
    CUDA(cudaStreamWaitEvent(stream, join));
    CUDA(emulator::launch(copy, 1, 32, 0, stream, result.data() + 32, other.data()));
  });
  CHECK_EQ(array.read()[0], 0u);  // nothing has run yet
  for (unsigned replay = 1; replay <= 3; ++replay) {
    CUDA(cudaGraphLaunch(exec, stream));
    CUDA(cudaStreamSynchronize(stream));
    const std::vector<unsigned> values = result.read();
    CHECK_EQ(values[0], replay);
    CHECK_EQ(values[63], replay);
  }
  CUDA(cudaGraphLaunch(exec, side));  // both streams at once: one replay after the other
  CUDA(cudaGraphLaunch(exec, stream));
  CUDA(cudaDeviceSynchronize());
  CHECK_EQ(array.read()[0], 5u);
  CUDA(cudaGraphExecDestroy(exec));
}

void test_wrong_captures() {
  DeviceArray<unsigned> array(32);
  const TestStream stream, side, outside;
  const TestEvent event, outer;
  cudaGraph_t graph = nullptr;
  CUDA(emulator::launch(fill, 1, 32, 0, outside, array.data(), 1u));
  CUDA(cudaEventRecord(outer, outside));
  // A stream that joined and did not come back.
  capture(
      stream,
      [&] {
        CUDA(cudaEventRecord(event, stream));
        CUDA(cudaStreamWaitEvent(side, event));
        CUDA(emulator::launch(fill, 1, 32, 0, side, array.data(), 1u));
      },
      cudaErrorStreamCaptureUnjoined);
  // A wait for work outside of it.
  capture(
      stream, [&] { CHECK_EQ(cudaStreamWaitEvent(stream, outer), cudaErrorStreamCaptureIsolation); },
      cudaErrorStreamCaptureInvalidated);
  // Two captures that meet.
  CUDA(cudaStreamBeginCapture(side, cudaStreamCaptureModeGlobal));
  CUDA(emulator::launch(fill, 1, 32, 0, side, array.data(), 1u));
  CUDA(cudaEventRecord(event, side));
  const cudaGraphExec_t exec =
      capture(stream, [&] { CHECK_EQ(cudaStreamWaitEvent(stream, event), cudaErrorStreamCaptureMerge); });
  CUDA(cudaGraphExecDestroy(exec));
  CHECK_EQ(cudaEventQuery(event), cudaErrorCapturedEvent);
  CUDA(cudaStreamEndCapture(side, &graph));
  CUDA(cudaGraphDestroy(graph));
  // Waits of the host, and calls that no capture holds.
  capture(
      stream, [&] { CHECK_EQ(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported); },
      cudaErrorStreamCaptureInvalidated);
  capture(
      stream, [&] { CHECK_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported); },
      cudaErrorStreamCaptureInvalidated);
  void* pointer = nullptr;
  capture(
      stream, [&] { CHECK_EQ(cudaMalloc(&pointer, 4), cudaErrorStreamCaptureUnsupported); },
      cudaErrorStreamCaptureInvalidated, cudaStreamCaptureModeThreadLocal);
  CHECK_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  CHECK_EQ(cudaStreamEndCapture(stream, &graph), cudaErrorInvalidValue);
  CUDA(cudaStreamSynchronize(outside));
  cudaGetLastError();
}

cudaError_t query_in_another_thread(cudaEvent_t event, std::optional<cudaStreamCaptureMode> mode) {
  cudaError_t answer = cudaSuccess;
  std::thread([&] {
    if (mode) CUDA(cudaThreadExchangeStreamCaptureMode(&*mode));
    answer = cudaEventQuery(event);
  }).join();
  return answer;
}

/// In the global mode what another thread does spoils a capture, unless that thread says that it knows what it does.
void test_capture_modes() {
  const TestStream stream, side;
  const TestEvent event;
  CUDA(cudaEventRecord(event, side));
  capture(
      stream, [&] { CHECK_EQ(query_in_another_thread(event, std::nullopt), cudaErrorStreamCaptureUnsupported); },
      cudaErrorStreamCaptureInvalidated);
  const auto harmless = [&](cudaStreamCaptureMode capturing, std::optional<cudaStreamCaptureMode> other) {
    const auto query = [&] { CUDA(query_in_another_thread(event, other)); };
    CUDA(cudaGraphExecDestroy(capture(stream, query, cudaSuccess, capturing)));
  };
  harmless(cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed);
  harmless(cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal);
  harmless(cudaStreamCaptureModeThreadLocal, std::nullopt);
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  std::thread([&] {
    cudaGraph_t graph = nullptr;
    CHECK_EQ(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureWrongThread);
  }).join();
  cudaGraph_t graph = nullptr;
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphDestroy(graph));
}

// --- failures ---

void test_failing_device() {
  CUDA(cudaSetDevice(6));
  {
    HostFlag flag;
    DeviceArray<unsigned> array(32);
    const TestStream stream;
    CUDA(emulator::launch(await, 4, 32, 0, stream, flag.on_device(), uint64_t{1}));
    emulator::fail_device(6);
    CHECK_EQ(cudaStreamSynchronize(stream), cudaErrorLaunchFailure);
    CHECK_EQ(emulator::launch(fill, 1, 32, 0, stream, array.data(), 1u), cudaErrorLaunchFailure);
    CHECK_EQ(std::string(cudaGetErrorString(cudaErrorLaunchFailure)), "GPU 6, which was made to fail");
    CUDA(cudaSetDevice(5));
    CUDA(cudaDeviceSynchronize());  // the others go on
    CUDA(cudaSetDevice(6));
    emulator::reset_device(6);
  }
  CUDA(cudaSetDevice(0));
  cudaGetLastError();
}

void test_stalled_device() {
  CUDA(cudaSetDevice(6));
  {
    DeviceArray<unsigned> array(32);
    const TestStream stream;
    emulator::stall_device(6, true);
    CUDA(emulator::launch(fill, 1, 32, 0, stream, array.data(), 3u));
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    CHECK_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
    emulator::stall_device(6, false);
    CUDA(cudaStreamSynchronize(stream));
    CHECK_EQ(array.read()[0], 3u);
  }
  CUDA(cudaSetDevice(0));
  cudaGetLastError();
}

// --- several GPUs ---

/// Each thread is a GPU; a number goes round and round.
void test_ring_of_threads() {
  constexpr int kGpus = 4;
  constexpr uint64_t kRounds = 25;
  std::vector<uint64_t*> flags(kGpus);
  for (int gpu = 0; gpu < kGpus; ++gpu) {
    CUDA(cudaSetDevice(gpu));
    CUDA(cudaMalloc(&flags[static_cast<size_t>(gpu)], sizeof(uint64_t)));
    CUDA(cudaMemset(flags[static_cast<size_t>(gpu)], 0, sizeof(uint64_t)));
    CUDA(cudaDeviceSynchronize());
  }
  CUDA(cudaSetDevice(0));
  run_threads(kGpus, [&](int rank) {
    CUDA(cudaSetDevice(rank));
    const TestStream stream;
    uint64_t* mine = flags[static_cast<size_t>(rank)];
    uint64_t* next = flags[static_cast<size_t>((rank + 1) % kGpus)];
    for (uint64_t round = 1; round <= kRounds; ++round) {
      if (rank > 0 || round > 1) CUDA(emulator::launch(await, 1, 1, 0, stream, mine, rank == 0 ? round - 1 : round));
      CUDA(emulator::launch(raise, 1, 1, 0, stream, next, round));
    }
    CUDA(cudaStreamSynchronize(stream));
  });
  for (uint64_t* flag : flags) CUDA(cudaFree(flag));
}

std::string share(const void* pointer) {
  cudaIpcMemHandle_t handle;
  CUDA(cudaIpcGetMemHandle(&handle, const_cast<void*>(pointer)));
  void* own = nullptr;
  CHECK_EQ(cudaIpcOpenMemHandle(&own, handle, cudaIpcMemLazyEnablePeerAccess), cudaErrorDeviceUninitialized);
  cudaGetLastError();
  return std::string(handle.reserved, sizeof handle.reserved);
}

cudaError_t open(void** pointer, const std::string& blob) {
  cudaIpcMemHandle_t handle;
  std::memcpy(handle.reserved, blob.data(), sizeof handle.reserved);
  return cudaIpcOpenMemHandle(pointer, handle, cudaIpcMemLazyEnablePeerAccess);
}

/// Each process is a GPU: kernels write to the others' memory and wait for what others write.
void run_ipc_rank(const Process& process) {
  CUDA(cudaSetDevice(process.rank));
  DeviceArray<uint64_t> flags(static_cast<size_t>(process.world_size));
  const std::vector<std::string> blobs = process.exchange(share(flags.data() + 1));  // stands for the allocation
  std::vector<uint64_t*> peers;
  for (int rank = 0; rank < process.world_size; ++rank) {
    void* pointer = flags.data();
    if (rank != process.rank) CUDA(open(&pointer, blobs[static_cast<size_t>(rank)]));
    peers.push_back(static_cast<uint64_t*>(pointer));
  }
  const int other = (process.rank + 1) % process.world_size;
  void* again = nullptr;
  CUDA(open(&again, blobs[static_cast<size_t>(other)]));
  CHECK(again == peers[static_cast<size_t>(other)]);
  CUDA(cudaIpcCloseMemHandle(again));
  cudaPointerAttributes attributes;
  CUDA(cudaPointerGetAttributes(&attributes, again));
  CHECK_EQ(attributes.type, cudaMemoryTypeDevice);

  const TestStream stream;
  for (uint64_t round = 1; round <= 20; ++round) {
    for (uint64_t* peer : peers) CUDA(emulator::launch(raise, 1, 1, 0, stream, peer + process.rank, round));
    for (int rank = 0; rank < process.world_size; ++rank)
      CUDA(emulator::launch(await, 1, 1, 0, stream, flags.data() + rank, round));
  }
  CUDA(cudaStreamSynchronize(stream));
  process.exchange("done");
  for (uint64_t* peer : peers)
    if (peer != flags.data()) CUDA(cudaIpcCloseMemHandle(peer));
  CHECK_EQ(cudaIpcCloseMemHandle(flags.data()), cudaErrorInvalidValue);
}

/// Memory stays for those who opened it, and nobody else can open it, once its owner was killed.
void run_killed_owner(const Process& process) {
  if (process.rank == 0) {
    const DeviceArray<unsigned> array(std::vector<unsigned>(1000, 42));
    process.exchange(share(array.data()));
    process.exchange("opened");
    ::kill(::getpid(), SIGKILL);
  }
  const std::vector<std::string> blobs = process.exchange("");
  const auto opens = [&blobs] {
    void* pointer = nullptr;
    if (open(&pointer, blobs[0]) != cudaSuccess) return false;
    unsigned value = 0;
    CUDA(cudaMemcpy(&value, static_cast<unsigned*>(pointer) + 999, sizeof value, cudaMemcpyDeviceToHost));
    CHECK_EQ(value, 42u);
    CUDA(cudaIpcCloseMemHandle(pointer));
    return true;
  };
  CHECK(opens());
  process.exchange("opened");
  CHECK(within(20, [&] { return !opens(); }));
}

void test_processes() {
  run_processes(4, run_ipc_rank);
  run_processes(2, run_killed_owner, {0});
}

/// A forked child has the parent's devices no more than CUDA's child has.
void test_forked_child() {
  const pid_t child = ::fork();
  if (child == 0) {
    int count = 0;
    ::_exit(cudaGetDeviceCount(&count) == cudaErrorInitializationError ? 0 : 1);
  }
  int status = 0;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

/// How many devices there are is read once: a process each.
void test_number_of_devices() {
  const auto status_with = [](const char* number, cudaError_t expected, int devices) {
    run_processes(1, [&](const Process&) {
      ::setenv("PARACOMM_EMULATED_DEVICES", number, 1);
      int count = 0;
      CHECK_EQ(cudaGetDeviceCount(&count), expected);
      CHECK_EQ(count, devices);
    });
  };
  status_with("3", cudaSuccess, 3);
  status_with("0", cudaErrorNoDevice, 0);
  status_with("many", cudaErrorInitializationError, 0);
  status_with("-1", cudaErrorInitializationError, 0);
}

}  // namespace

int main() {
  // First, because they fork: this process must not have used its devices before.
  test_number_of_devices();
  test_processes();
  test_devices();
  test_forked_child();
  test_memory();
  test_asynchrony();
  test_streams_run_at_once();
  test_copies();
  test_events();
  test_default_stream();
  test_wrong_launches();
  test_destroyed_stream();
  test_graphs();
  test_wrong_captures();
  test_capture_modes();
  test_failing_device();
  test_stalled_device();
  test_ring_of_threads();
}
