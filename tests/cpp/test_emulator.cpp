// The emulator itself: what kernels and the runtime API do on it, and that their wrong uses are caught.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <signal.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/emulator/control.h"
#include "ranks.h"

using namespace paracomm_test;
namespace emulator = paracomm::emulator;

#define CUDA(call)                                                                                         \
  do {                                                                                                     \
    if (const cudaError_t cuda_error = (call); cuda_error != cudaSuccess)                                  \
      ::paracomm_test::fail(__FILE__, __LINE__, std::string(#call ": ") + cudaGetErrorString(cuda_error)); \
  } while (0)

namespace {

// --- what tests share ---

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
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, const std::type_identity_t<Parameters>&... arguments) {
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

// --- indices, barriers, shared memory ---

__global__ void write_indices(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block << 16 | thread;
}

void test_indices() {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  DeviceArray<unsigned> out(12 * 60);
  run(write_indices, grid, block, out.data());
  const std::vector<unsigned> values = out.read();
  for (unsigned i = 0; i < values.size(); ++i) CHECK_EQ(values[i], (i / 60) << 16 | i % 60);
}

/// Each round every thread reads what its neighbour wrote.
__global__ void rotate(int* out, int rounds) {
  __shared__ int values[128];
  const unsigned me = threadIdx.x, next = (me + 1) % blockDim.x;
  values[me] = static_cast<int>(me);
  for (int i = 0; i < rounds; ++i) {
    __syncthreads();
    const int taken = values[next];
    __syncthreads();
    values[me] = taken;
  }
  out[blockIdx.x * blockDim.x + me] = values[me];
}

void test_barriers() {
  DeviceArray<int> out(20 * 96);
  run(rotate, 20, 96, out.data(), 11);
  const std::vector<int> values = out.read();
  for (size_t i = 0; i < values.size(); ++i) CHECK_EQ(values[i], static_cast<int>((i % 96 + 11) % 96));
}

__global__ void reduce_barriers(int* out) {
  if (threadIdx.x >= 40) return;  // those who have ended are not waited for
  const int odd = threadIdx.x % 2;
  out[threadIdx.x * 3] = __syncthreads_count(odd);
  out[threadIdx.x * 3 + 1] = __syncthreads_or(threadIdx.x == 17);
  out[threadIdx.x * 3 + 2] = __syncthreads_and(odd);
}

void test_barrier_reductions() {
  DeviceArray<int> out(40 * 3);
  run(reduce_barriers, 1, 64, out.data());
  const std::vector<int> values = out.read();
  for (size_t i = 0; i < 40; ++i) {
    CHECK_EQ(values[i * 3], 20);
    CHECK_EQ(values[i * 3 + 1], 1);
    CHECK_EQ(values[i * 3 + 2], 0);
  }
}

__global__ void use_dynamic(int* out) {
  int* shared = static_cast<int*>(emulator::dynamic_shared());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

void test_dynamic_shared() {
  DeviceArray<int> out(64);
  CUDA(emulator::launch(use_dynamic, 1, 64, 64 * sizeof(int), nullptr, out.data()));
  const std::vector<int> values = out.read();
  for (int i = 0; i < 64; ++i) CHECK_EQ(values[static_cast<size_t>(i)], 63 - i);
}

// --- warps ---

__global__ void warp_functions(unsigned* out) {
  const unsigned all = 0xffffffff, lane = threadIdx.x % 32;
  unsigned* mine = out + threadIdx.x * 10;
  mine[0] = __shfl_sync(all, lane * 3, 5);
  mine[1] = __shfl_down_sync(all, lane, 3);
  mine[2] = __shfl_up_sync(all, lane, 3);
  mine[3] = __shfl_xor_sync(all, lane, 9);
  mine[4] = __ballot_sync(all, lane % 3 == 0);
  mine[5] = static_cast<unsigned>(__any_sync(all, lane == 31)) + 2 * static_cast<unsigned>(__all_sync(all, lane < 31));
  mine[6] = __shfl_down_sync(all, lane, 3, 8);
  const double wide = __shfl_sync(all, 1.5 * lane, 7);
  mine[7] = static_cast<unsigned>(wide * 2);
  // Halves of the warp meet apart.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  if (lane < 16)
    mine[8] = __ballot_sync(half, 1);
  else
    mine[8] = __ballot_sync(half, lane % 2);
  __syncwarp();
  mine[9] = __activemask();
  __syncwarp();
}

void test_warps() {
  DeviceArray<unsigned> out(64 * 10);
  run(warp_functions, 1, 64, out.data());
  const std::vector<unsigned> values = out.read();
  for (unsigned thread = 0; thread < 64; ++thread) {
    const unsigned lane = thread % 32;
    const unsigned* mine = &values[thread * 10];
    CHECK_EQ(mine[0], 15u);
    CHECK_EQ(mine[1], lane + 3 < 32 ? lane + 3 : lane);
    CHECK_EQ(mine[2], lane >= 3 ? lane - 3 : lane);
    CHECK_EQ(mine[3], lane ^ 9);
    CHECK_EQ(mine[4], 0x49249249u);
    CHECK_EQ(mine[5], 1u);
    CHECK_EQ(mine[6], lane % 8 + 3 < 8 ? lane + 3 : lane);
    CHECK_EQ(mine[7], 21u);
    CHECK_EQ(mine[8], lane < 16 ? 0xffffu : 0xaaaa0000u);
    CHECK_EQ(mine[9], 0xffffffffu);
  }
}

}  // namespace

int main() {
  test_indices();
  test_barriers();
  test_barrier_reductions();
  test_dynamic_shared();
  test_warps();
}
