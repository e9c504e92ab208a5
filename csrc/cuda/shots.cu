// All-reduce in one kernel without messages, for small and middle sizes: peers read each other's staging buffers.
//
// One-shot: every rank copies its input into its staging buffer, says so, waits for all, and adds all buffers in the
// order of ranks. Two-shot: the same for its own part of the elements, in place; then says so again, waits again, and
// copies the other parts from their owners. Both give x0 + x1 + x2 + ..., rounded once: the bits of the schedules
// "one_shot" and "ordered". 3 ranks, two-shot:
//
//     stage       rank 0                rank 1                rank 2
//     1 ready     s0 = x0               s1 = x1               s2 = x2
//     2 reduced   s0.a = x0+x1+x2 (a)   s1.b = x0+x1+x2 (b)   s2.c = x0+x1+x2 (c)
//     3 done      out = s0.a s1.b s2.c  ... on every rank
//
// Block b of a rank reads only what block b of the peers has written, so that blocks need no common barrier. Calls use
// two staging buffers in turn, the same in all blocks, because a call of another length gives a block other elements:
// who is ready in call n + 1 is through with call n, so that call n + 2, which begins when all were ready in n + 1, may
// write the buffer of call n anew. Nobody waits for stage 3 but the drain before memory is freed.
//
// Bytes read from each peer: S one-shot, 2 S / n two-shot. The two-shot's flags travel twice.
#include "cuda/combine.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {
namespace {

constexpr uint64_t kReady = 1, kReduced = 2, kDone = 3, kStages = 3;

/// This block's call: the `number`-th.
struct Call {
  uint64_t number;

  __device__ __forceinline__ int parity() const { return static_cast<int>(number % 2); }
  __device__ __forceinline__ int buffer() const { return PARACOMM_PLANTED(Plant::stage_one_buffer) ? 0 : parity(); }
  __device__ __forceinline__ uint64_t stage(uint64_t which) const {
    return (PARACOMM_PLANTED(Plant::stage_same_number) ? 0 : number * kStages) + which;
  }
};

__device__ __forceinline__ Flag& flag_of(Block& block, const Fabric& fabric, const Call& call, int of, int at) {
  const size_t offset = fabric.layout.stage(static_cast<int>(blockIdx.x), of, call.parity());
  return *reinterpret_cast<Flag*>(block.arenas[at] + offset);
}

/// This block of this rank has finished a stage.
__device__ inline void tell(Block& block, const Fabric& fabric, const Call& call, uint64_t which) {
  if (!PARACOMM_PLANTED(Plant::stage_before_data)) __syncthreads();
  for (int p = static_cast<int>(threadIdx.x); p < fabric.layout.world_size; p += static_cast<int>(blockDim.x)) {
    if (p == fabric.rank) continue;
    Flag& flag = flag_of(block, fabric, call, fabric.rank, p);
    // Later stages are of the same call; the peer may be reading.
    if (which == kReady)
      for (int i = 0; i < kWords; ++i) flag.signature[i] = fabric.signature[i];
    if (PARACOMM_PLANTED(Plant::stage_relaxed))
      store_relaxed(&flag.number, call.stage(which));
    else
      store_release(&flag.number, call.stage(which));
  }
}

/// Waits until that block of every peer has finished it too. False: leave.
__device__ inline bool hear(Block& block, const Fabric& fabric, const Call& call, uint64_t which) {
  const bool skip = PARACOMM_PLANTED(Plant::stage_without_wait) ||
                    (which == kReduced && PARACOMM_PLANTED(Plant::stage_skips_gather_wait));
  for (int p = static_cast<int>(threadIdx.x); p < fabric.layout.world_size; p += static_cast<int>(blockDim.x)) {
    if (p == fabric.rank || skip) continue;
    const Flag& flag = flag_of(block, fabric, call, p, fabric.rank);
    const auto there = [&] {
      if (PARACOMM_PLANTED(Plant::stage_read_relaxed)) return load_relaxed(&flag.number) >= call.stage(which);
      return load_acquire(&flag.number) >= call.stage(which);
    };
    const Spot spot{Trouble::stage_timeout, p};
    if (wait_until(block, fabric, spot, there) && which == kReady) is_same_call(block, fabric, flag, spot);
  }
  if (!PARACOMM_PLANTED(Plant::stage_after_flag)) __syncthreads();
  return block.stop == 0;
}

/// The elements of part `p` that are this block's.
struct Range {
  uint64_t begin, end;
};

template <class E>
__device__ __forceinline__ Range range_of(const ShotArguments& args, int p) {
  const uint64_t parts = args.two ? static_cast<uint64_t>(args.fabric.layout.world_size) : 1;
  const uint64_t vectors = (args.count + kLanes<E> - 1) / kLanes<E>, part = static_cast<uint64_t>(p);
  const uint64_t begin = vectors * part / parts, all = vectors * (part + 1) / parts - begin;
  const uint64_t low = begin + all * blockIdx.x / gridDim.x, high = begin + all * (blockIdx.x + 1) / gridDim.x;
  const uint64_t end = high * kLanes<E>;
  return {low * kLanes<E>, end < args.count ? end : args.count};
}

/// Elements of a range from one memory to another of the same layout.
template <class E>
__device__ __forceinline__ void copy_range(const Range& range, const std::byte* from, std::byte* to) {
  if (range.begin >= range.end) return;
  using Stored = typename E::Stored;
  copy<Stored>(Pair{from, to, range.begin * sizeof(Stored)}, range.end - range.begin);
}

/// All staging buffers, in the order of ranks, into `to`.
template <class E>
__device__ __forceinline__ void reduce_range(Block& block, const ShotArguments& args, const Range& range, int buffer,
                                             std::byte* to) {
  const Layout& layout = args.fabric.layout;
  for (int p = static_cast<int>(threadIdx.x); p < layout.world_size; p += static_cast<int>(blockDim.x))
    block.sources[p] = block.arenas[p] + layout.staging(buffer);
  if (threadIdx.x == 0) block.destinations[0] = to;
  if (!PARACOMM_PLANTED(Plant::stage_sources_unset)) __syncthreads();
  if (range.begin >= range.end) return;
  const Lists lists{block, layout.world_size, 1, range.begin * sizeof(typename E::Stored)};
  reduce<E>(lists, range.end - range.begin, args.op, args.divisor);
}

template <class E>
__global__ void __launch_bounds__(kMaxThreads, 1) all_reduce_shot(const __grid_constant__ ShotArguments args) {
  __shared__ Block block;
  const Fabric& fabric = args.fabric;
  const Layout& layout = fabric.layout;
  if (!begin(block, fabric)) return;
  std::byte* const own = block.arenas[fabric.rank];
  uint64_t& calls = *word_at(own, layout.call(static_cast<int>(blockIdx.x)));
  const Call call{calls};
  const int parts = args.two ? layout.world_size : 1;
  const size_t staging = layout.staging(call.buffer());

  for (int p = 0; p < parts; ++p) copy_range<E>(range_of<E>(args, p), args.input, own + staging);
  tell(block, fabric, call, kReady);
  if (!hear(block, fabric, call, kReady)) return;
  reduce_range<E>(block, args, range_of<E>(args, args.two ? fabric.rank : 0), call.buffer(),
                  args.two ? own + staging : args.output);
  if (args.two) {
    tell(block, fabric, call, kReduced);
    if (!hear(block, fabric, call, kReduced)) return;
    for (int k = 0; k < parts; ++k) {
      const int p = (fabric.rank + k) % parts;  // no rank is everybody's first
      copy_range<E>(range_of<E>(args, p), block.arenas[p] + staging, args.output);
    }
  }
  tell(block, fabric, call, kDone);
  if (threadIdx.x == 0 && !PARACOMM_PLANTED(Plant::calls_not_kept)) calls = call.number + 1;
}

/// Until nobody will write to this rank's memory or read it any more: peers give credit for what they have read.
__global__ void __launch_bounds__(kMaxThreads, 1) drain(const __grid_constant__ DrainArguments args) {
  __shared__ Block block;
  const Fabric& fabric = args.fabric;
  const Layout& layout = fabric.layout;
  if (!begin(block, fabric)) return;
  std::byte* const own = block.arenas[fabric.rank];
  const int world_size = layout.world_size;
  for (int i = static_cast<int>(threadIdx.x); i < layout.channels * world_size; i += static_cast<int>(blockDim.x)) {
    const int channel = i / world_size, peer = i % world_size;
    const auto& sent = *reinterpret_cast<const Cursor*>(own + layout.sent(channel, peer));
    const uint64_t* const credit = word_at(own, layout.credit(channel, peer));
    wait_until(block, fabric, {Trouble::send_timeout, peer},
               [&] { return load_acquire(credit) >> 32 == (sent.number & 0xffffffffu); });
  }
  for (int i = static_cast<int>(threadIdx.x); i < layout.shot_blocks * world_size; i += static_cast<int>(blockDim.x)) {
    const int number = i / world_size, peer = i % world_size;
    const uint64_t calls = *word_at(own, layout.call(number));
    if (peer == fabric.rank || calls == 0) continue;
    const auto parity = static_cast<int>((calls - 1) % 2);
    const auto& flag = *reinterpret_cast<const Flag*>(own + layout.stage(number, peer, parity));
    wait_until(block, fabric, {Trouble::stage_timeout, peer},
               [&] { return load_acquire(&flag.number) >= calls * kStages; });
  }
}

}  // namespace

cudaError_t launch_shot(const ShotArguments& args, DType dtype, int blocks, int threads, cudaStream_t stream) {
  return with_element(
      dtype, [&](auto element) { return launch(all_reduce_shot<decltype(element)>, blocks, threads, stream, args); });
}

cudaError_t launch_drain(const DrainArguments& args, int threads, cudaStream_t stream) {
  return launch(drain, 1, threads, stream, args);
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
