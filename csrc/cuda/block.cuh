// What the threads of a block share, and how they wait: every wait looks at the abort words and at the clock, so that
// no kernel outlives its peers. A block that gives up says why, once, and leaves at its next barrier.
#pragma once

#include "cuda/arguments.h"
#include "cuda/plant.h"
#include "cuda/ptx.cuh"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

constexpr unsigned kLooks = 32;  // at a flag, between two at the abort words, which may lie beyond a bus

struct Block {
  std::byte* arenas[kMaxRanks];
  Cursor sent[kMaxRanks], received[kMaxRanks];
  // of the instruction under way
  const std::byte* sources[kMaxOperands];
  std::byte* destinations[kMaxOperands];
  uint64_t* flags[2 * kMaxOperands];  ///< what to write when it is done, null: nothing
  uint64_t numbers[2 * kMaxOperands];
  uint64_t deadline;
  int stop;
};

/// Where a wait is, for a report.
struct Spot {
  Trouble trouble;
  int peer;
  int instruction = -1;
  int tile = 0;
  uint64_t nbytes = 0;  ///< of the message
};

__device__ __forceinline__ uint64_t* word_at(std::byte* base, size_t offset) {
  return reinterpret_cast<uint64_t*>(base + offset);
}

/// This rank leaves its call. The others of this device see it, and the host.
__device__ inline void leave(Block& block, const Fabric& fabric) {
  atomicExch(&block.stop, 1);
  store_relaxed(fabric.watch.stop, 1);
  Board& board = *fabric.watch.board;
  // Calls run one after the other, so that whoever finds 0 here belongs to the first call.
  if (load_relaxed(&board.left_at) == 0) store_relaxed(&board.left_at, fabric.signature[0] & 0xffffffffu);
}

__device__ inline void report(Block& block, const Fabric& fabric, const Spot& spot, const Flag* seen) {
  const bool first = atomicCAS(reinterpret_cast<unsigned long long*>(fabric.watch.stop + 1), 0ull, 1ull) == 0;
  if (first) {
    Report& to = fabric.watch.board->report;
    to.trouble = static_cast<uint64_t>(spot.trouble);
    to.instruction = static_cast<uint64_t>(spot.instruction);
    to.tile = static_cast<uint64_t>(spot.tile);
    to.peer = static_cast<uint64_t>(spot.peer);
    to.sequence = fabric.signature[0] & 0xffffffffu;
    for (int i = 0; i < kWords; ++i) to.seen[i] = seen == nullptr ? 0 : seen->signature[i];
    to.seen_bytes = seen == nullptr ? 0 : seen->nbytes;
    to.expected_bytes = spot.nbytes;
    if (PARACOMM_PLANTED(Plant::report_relaxed))
      store_relaxed(&to.ready, 1);
    else
      store_release(&to.ready, 1);
  }
  leave(block, fabric);
}

__device__ inline bool told_to_stop(const Fabric& fabric) {
  if (PARACOMM_PLANTED(Plant::abort_not_seen)) return false;
  return load_relaxed(fabric.watch.stop) != 0 || load_relaxed(&fabric.watch.board->abort) != 0;
}

/// What a rank sent before it left is there once this is seen.
__device__ inline bool is_gone(const Fabric& fabric, int peer) {
  if (PARACOMM_PLANTED(Plant::gone_not_seen)) return false;
  return (load_acquire(&fabric.watch.board->gone) >> peer & 1) != 0;
}

/// Returns whether ready() came true.
template <class Ready>
__device__ __forceinline__ bool wait_until(Block& block, const Fabric& fabric, Spot spot, Ready ready) {
  for (unsigned look = 1; !ready(); ++look) {
    if (look % kLooks == 0) {
      if (told_to_stop(fabric)) {
        leave(block, fabric);
        return false;
      }
      if (now_ns() >= block.deadline && !PARACOMM_PLANTED(Plant::deadline_not_seen)) {
        report(block, fabric, spot, nullptr);
        return false;
      }
      if (is_gone(fabric, spot.peer) && !ready()) {
        spot.trouble = Trouble::peer_left;
        report(block, fabric, spot, nullptr);
        return false;
      }
    }
    pause_spin();
  }
  return true;
}

/// A peer's flag, once it is there, must be of the same call.
__device__ inline bool is_same_call(Block& block, const Fabric& fabric, const Flag& flag, Spot spot) {
  if (PARACOMM_PLANTED(Plant::signature_not_compared)) return true;
  bool same = flag.nbytes == spot.nbytes || PARACOMM_PLANTED(Plant::size_not_compared);
  for (int i = 0; i < kWords; ++i) same &= flag.signature[i] == fabric.signature[i];
  if (same) return true;
  spot.trouble = Trouble::mismatch;
  report(block, fabric, spot, &flag);
  return false;
}

/// False: the call is to be left at once. For all threads of the block.
__device__ inline bool begin(Block& block, const Fabric& fabric) {
  for (int p = static_cast<int>(threadIdx.x); p < fabric.layout.world_size; p += static_cast<int>(blockDim.x))
    block.arenas[p] = fabric.arenas[p];
  if (threadIdx.x == 0) {
    block.stop = 0;
    const uint64_t now = now_ns();
    block.deadline = fabric.watch.timeout_ns > ~uint64_t{0} - now ? ~uint64_t{0} : now + fabric.watch.timeout_ns;
    if (told_to_stop(fabric)) leave(block, fabric);
  }
  if (!PARACOMM_PLANTED(Plant::begin_apart)) __syncthreads();
  const bool stop = block.stop != 0;
  if (!PARACOMM_PLANTED(Plant::leave_apart))
    __syncthreads();  // from here on a thread that gives up may set it, and all must have seen the same
  return !stop;
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
