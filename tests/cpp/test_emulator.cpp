// Kernels on emulated GPUs: CUDA's built-ins, the order of threads, and wrong uses that are caught.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <set>
#include <vector>

#include "cuda/emulator/block.h"
#include "emulated.h"

using namespace paracomm_test;

namespace {

// --- indices, barriers, shared memory ---

__global__ void write_indices(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block << 16 | thread;
}

void test_indices() {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  DeviceArray<unsigned> out(12 * 60);
  run_kernel(write_indices, grid, block, out.data());
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
  run_kernel(rotate, 20, 96, out.data(), 11);
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
  run_kernel(reduce_barriers, 1, 64, out.data());
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
  run_kernel(warp_functions, 1, 64, out.data());
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

// --- memory that others use ---

__global__ void count_atomically(unsigned* counters) {
  atomicAdd(&counters[0], 1u);
  atomicAdd_system(&counters[1], threadIdx.x);
  atomicMax(&counters[2], blockIdx.x * blockDim.x + threadIdx.x);
  atomicOr_block(&counters[3], 1u << threadIdx.x % 32);
  atomicInc(&counters[4], 9);
  // A lock.
  while (atomicCAS(&counters[5], 0u, 1u) != 0) {
  }
  const unsigned held = emulator::load_relaxed(&counters[6]);
  __threadfence();
  emulator::store_relaxed(&counters[6], held + 1);
  __threadfence();
  atomicExch(&counters[5], 0u);
}

void test_atomics() {
  DeviceArray<unsigned> counters(8);
  run_kernel(count_atomically, 8, 64, counters.data());
  const std::vector<unsigned> values = counters.read();
  CHECK_EQ(values[0], 512u);
  CHECK_EQ(values[1], 8u * (63 * 64 / 2));
  CHECK_EQ(values[2], 511u);
  CHECK_EQ(values[3], 0xffffffffu);
  CHECK_EQ(values[4], 512u % 10);
  CHECK_EQ(values[6], 512u);
}

__global__ void add_floats(float* sums) {
  atomicAdd(&sums[0], 0.5f);
  float4 pair = make_float4(1, 2, 3, 4);
  if (threadIdx.x + blockIdx.x == 0) *reinterpret_cast<float4*>(sums + 4) = pair;
}

void test_floats_and_vectors() {
  DeviceArray<float> sums(8);
  run_kernel(add_floats, 4, 32, sums.data());
  const std::vector<float> values = sums.read();
  CHECK_EQ(values[0], 64.0f);
  for (size_t i = 0; i < 4; ++i) CHECK_EQ(values[4 + i], static_cast<float>(i + 1));
}

/// Block b passes a number on to block b + 1, round after round; the words of each message are plain memory.
__global__ void relay(uint64_t* flags, unsigned* messages, unsigned rounds, const uint64_t* abort) {
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  for (unsigned round = 1; round <= rounds; ++round) {
    if (threadIdx.x == 0 && !(blockIdx.x == 0 && round == 1))
      while (emulator::load_acquire(&flags[blockIdx.x]) < round && emulator::load_relaxed(abort) == 0) {
      }
    __syncthreads();
    messages[next * blockDim.x + threadIdx.x] = messages[blockIdx.x * blockDim.x + threadIdx.x] + 1;
    __syncthreads();
    if (threadIdx.x == 0) emulator::store_release(&flags[next], uint64_t{round + (next == 0)});
  }
}

void test_flags() {
  constexpr unsigned kBlocks = 5, kRounds = 20;
  DeviceArray<uint64_t> flags(kBlocks + 1);
  DeviceArray<unsigned> messages(kBlocks * 32);
  run_kernel(relay, kBlocks, 32, flags.data(), messages.data(), kRounds, flags.data() + kBlocks);
  CHECK_EQ(messages.read()[0], kBlocks * kRounds);
}

#if PARACOMM_EMULATOR_TSAN
/// With a flag that orders nothing; what ThreadSanitizer then says ends this program.
__global__ void race(uint64_t* flag, unsigned* message) {
  if (blockIdx.x == 0) {
    *message = 7;
    emulator::store_relaxed(flag, uint64_t{1});
  } else {
    while (emulator::load_acquire(flag) == 0) {
    }
    *message += 1;
  }
}

__global__ void race_without_barrier(unsigned* out) {
  __shared__ unsigned values[32];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[31 - threadIdx.x];
}

void race_for_good(const std::string& which) {
  DeviceArray<uint64_t> flag(1);
  DeviceArray<unsigned> out(32);
  if (which == "flag")
    run_kernel(race, 2, 1, flag.data(), out.data());
  else
    run_kernel(race_without_barrier, 1, 32, out.data());
}

int status_of_race(const char* which) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(STDERR_FILENO);  // which the report would go to
    ::execl("/proc/self/exe", "test_emulator", which, nullptr);
    ::_exit(1);
  }
  int status = 0;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  return WEXITSTATUS(status);
}

void test_races_are_seen() {
  constexpr int kReported = 66;
  CHECK_EQ(status_of_race("flag"), kReported);
  CHECK_EQ(status_of_race("barrier"), kReported);
}
#endif

// --- numbers ---

bool is_nan(unsigned half_bits) { return (half_bits & 0x7fff) > 0x7c00; }

/// The 16-bit value nearest to `value`, by trying its neighbours; ties go to the even one.
template <class Widen>
unsigned nearest(float value, unsigned guess, Widen widen) {
  unsigned best = guess;
  for (const unsigned candidate : {guess - 1, guess + 1}) {
    if ((candidate ^ guess) & 0x8000 || candidate > 0xffff) continue;
    const double error = std::fabs(static_cast<double>(widen(candidate)) - value);
    const double least = std::fabs(static_cast<double>(widen(best)) - value);
    if (error < least || (error == least && candidate % 2 == 0)) best = candidate;
  }
  return best;
}

void test_float16() {
  const auto widen = [](unsigned bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); };
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const unsigned back = __half_as_ushort(__float2half_rn(widen(bits)));
    CHECK_EQ(back, is_nan(bits) ? 0x7fffu : bits);
  }
  CHECK_EQ(widen(0x0001), 0x1p-24f);
  CHECK_EQ(widen(0x8400), -0x1p-14f);
  CHECK_EQ(__float_as_uint(widen(0xfe00)), 0x7fffffffu);
  emulator::Random random(1);
  for (int i = 0; i < 1'000'000; ++i) {
    // Exponents around those that float16 has.
    const auto bits = static_cast<unsigned>(random.next());
    const float value = std::ldexp(1 + static_cast<float>(bits >> 9) * 0x1p-23f, static_cast<int>(bits % 40) - 26);
    const unsigned rounded = __half_as_ushort(__float2half_rn(value));
    if (value >= 65520)
      CHECK_EQ(rounded, 0x7c00u);
    else if (value < 65504)
      CHECK_EQ(rounded, nearest(value, rounded, widen));
  }
}

void test_bfloat16() {
  const auto widen = [](unsigned bits) {
    return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
  };
  for (unsigned bits = 0; bits < 0x10000; ++bits)
    if ((bits & 0x7fff) <= 0x7f80) CHECK_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(widen(bits))), bits);
  emulator::Random random(2);
  for (int i = 0; i < 1'000'000; ++i) {
    const float value = __uint_as_float(static_cast<unsigned>(random.next()) & 0x7effffff);
    const unsigned rounded = __bfloat16_as_ushort(__float2bfloat16_rn(value));
    CHECK_EQ(rounded, nearest(value, rounded, widen));
  }
  CHECK_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(std::numeric_limits<float>::quiet_NaN())), 0x7fffu);
  CHECK_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(std::numeric_limits<float>::max())), 0x7f80u);
}

// --- interleavings ---

__global__ void note_order(unsigned* order, unsigned* next) { order[atomicAdd(next, 1u)] = threadIdx.x; }

std::vector<unsigned> order_of_threads(uint64_t seed) {
  emulator::set_seed(seed);
  DeviceArray<unsigned> order(64), next(1);
  const TestStream stream;  // a new one, because the number of a launch has its part in the disturbance
  CUDA(emulator::launch(note_order, 1, 64, 0, stream, order.data(), next.data()));
  CUDA(cudaStreamSynchronize(stream));
  emulator::set_seed(0);
  return order.read();
}

void test_seeds() {
  std::set<std::vector<unsigned>> orders;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    orders.insert(order_of_threads(seed));
    CHECK(order_of_threads(seed) == order_of_threads(seed));
  }
  CHECK_EQ(orders.size(), size_t{20});
  for (unsigned i = 0; i < 64; ++i) CHECK_EQ(order_of_threads(0)[i], i);
}

/// All blocks meet: possible if all are resident.
__global__ void meet_grid(unsigned* arrived) {
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1u);
    while (emulator::load_acquire(arrived) < gridDim.x) {
    }
  }
  __syncthreads();
}

void test_residency() {
  DeviceArray<unsigned> arrived(1);
  run_kernel(meet_grid, 16, 32, arrived.data());
  CHECK_EQ(arrived.read()[0], 16u);
}

// --- wrong uses ---

__global__ void diverge() {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void miss_barrier(unsigned* never) {
  if (threadIdx.x == 3)
    while (emulator::load_acquire(never) == 0) {
    }
  else
    __syncthreads();
}
__global__ void wait_crosswise() {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncwarp();
}
__global__ void be_outside_own_mask() { __shfl_sync(0xff, 1, 0); }
__global__ void read_absent_lane() {
  if (threadIdx.x < 8) __shfl_sync(0xff, 1, 9);
}
__global__ void mix_warp_functions() {
  if (threadIdx.x % 2 == 0)
    __syncwarp();
  else
    __any_sync(0xffffffff, 1);
}
__global__ void give_up() {
  if (threadIdx.x == 5) __trap();
  __syncthreads();
}
void test_wrong_uses() {
  check_fails(cudaErrorLaunchFailure, "__syncthreads() here, while other threads of the block wait at that of", diverge,
              32);
  check_fails(cudaErrorLaunchFailure, "deadlock: threads 0-15: at __syncthreads() of test_emulator.cpp", wait_crosswise,
              32);
  check_fails(cudaErrorLaunchFailure, "not in its own mask 0xff", be_outside_own_mask, 32);
  check_fails(cudaErrorLaunchFailure, "wants the value of lane 9", read_absent_lane, 32);
  check_fails(cudaErrorLaunchFailure, "another warp function than thread", mix_warp_functions, 32);
  check_fails(cudaErrorLaunchFailure, "thread 5 at test_emulator.cpp", give_up, 32);
}

void test_stuck() {
  emulator::set_patience(0.2);
  CUDA(cudaSetDevice(7));
  DeviceArray<unsigned> words(4);
  CUDA(cudaSetDevice(0));
  const std::string polled = "thread 3: polling memory of GPU 7 + 0x8, which stays 0; threads 4-31: at __syncthreads()";
  check_fails(cudaErrorLaunchTimeout, polled, miss_barrier, 32, words.data() + 2);
  // One block more than the device holds at once.
  CUDA(cudaSetDevice(7));
  CUDA(emulator::launch(meet_grid, 17, 1, 0, nullptr, words.data()));
  CHECK_EQ(cudaDeviceSynchronize(), cudaErrorLaunchTimeout);
  emulator::reset_device(7);
  emulator::set_patience(60);
}

#if !PARACOMM_EMULATOR_ASAN
__attribute__((noinline)) void reach_into_neighbour() {
  volatile char hole[emulator::Stacks::kBytes];
  for (volatile char& byte : hole) byte = 1;
  __nanosleep(1);
}
__global__ void overflow_stack() {
  if (threadIdx.x == 1) reach_into_neighbour();
}

void test_stack_overflow() { check_fails(cudaErrorIllegalAddress, "overflowed its stack", overflow_stack, 2); }
#endif

}  // namespace

int main([[maybe_unused]] int count, [[maybe_unused]] char** words) {
#if PARACOMM_EMULATOR_TSAN
  if (count > 1) return race_for_good(words[1]), 0;
  test_races_are_seen();
#endif
  test_indices();
  test_barriers();
  test_barrier_reductions();
  test_dynamic_shared();
  test_warps();
  test_atomics();
  test_floats_and_vectors();
  test_flags();
  test_float16();
  test_bfloat16();
  test_seeds();
  test_residency();
  test_wrong_uses();
  test_stuck();
#if !PARACOMM_EMULATOR_ASAN  // which has something to say about that itself
  test_stack_overflow();
#endif
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    emulator::set_seed(seed);
    test_barriers();
    test_warps();
    test_atomics();
    test_flags();
    test_residency();
  }
}
