// What device code asks of the block that runs it. Everything here is for kernels alone.
#pragma once

#include <cstdint>
#include <source_location>

#include "sanitizers.h"
#include "vocabulary.h"

namespace paracomm::emulator {

using Where = std::source_location;

struct Geometry {
  api::uint3 block{};
  api::dim3 block_dim, grid_dim;
};

/// The CUDA thread that this OS thread is running; null outside of kernels.
struct Position {
  api::uint3 thread{};
  uint32_t lane = 0;
  const Geometry* geometry = nullptr;
};
extern constinit thread_local const Position* position;

PARACOMM_EMULATOR_UNSEEN inline api::uint3 thread_index() { return position->thread; }
PARACOMM_EMULATOR_UNSEEN inline api::uint3 block_index() { return position->geometry->block; }
PARACOMM_EMULATOR_UNSEEN inline api::dim3 block_dim() { return position->geometry->block_dim; }
PARACOMM_EMULATOR_UNSEEN inline api::dim3 grid_dim() { return position->geometry->grid_dim; }
PARACOMM_EMULATOR_UNSEEN inline unsigned lane() { return position->lane; }

// --- meeting others of the block ---

/// Waits for all threads of the block that have not ended; returns how many came with a true predicate.
int sync_threads(bool predicate, Where where);

enum class WarpCall : uint8_t { sync, shuffle, vote };
/// What a lane brings to a meeting of its warp, and what it takes from there.
struct Exchange {
  WarpCall call = WarpCall::sync;
  uint32_t mask = 0;
  uint64_t value = 0;      ///< offered to others
  unsigned source = 0;     ///< the lane whose value is wanted
  bool predicate = false;  ///< of a vote
  uint64_t received = 0;   ///< the value of lane `source`
  uint32_t ballot = 0;     ///< lanes with a true predicate
};
/// Waits for the lanes of `exchange.mask` that have not ended. Orders memory between them where the call is a sync.
void meet(Exchange& exchange, Where where);
/// Lanes of this warp that have not ended.
uint32_t lanes_alive();

// --- meeting others of the machine ---

/// To be called where another thread may come in between: with a seed, one sometimes does.
void preempt();
/// To be called with what was read from memory that others write. A thread that sees one value twice is polling, and
/// hands over.
void observed(const void* address, uint64_t value);
/// Hands over to the other threads.
void yield();
/// Orders what this thread did before with what it does after, for those who look through atomics.
void fence();
/// Whether relaxed stores release, because a fence came before: see `fence`.
bool fenced();

/// Nanoseconds, the same clock in all blocks and processes of this machine.
uint64_t globaltimer();
/// Ends the launch with cudaErrorLaunchFailure; `why` becomes part of its report.
[[noreturn]] void trap(const char* why, Where where);
/// The bytes that the launch asked for, aligned to 128, with garbage in them.
void* dynamic_shared();

}  // namespace paracomm::emulator
