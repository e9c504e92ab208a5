// What kernels are given, and what they give back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "cuda/layout.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

enum class Trouble : uint64_t { none, recv_timeout, send_timeout, stage_timeout, mismatch, peer_left };

/// Why a kernel gave up, written once, by whoever is first.
struct Report {
  uint64_t trouble, instruction, tile, peer;
  uint64_t sequence;  ///< of the call
  uint64_t seen[kWords];
  uint64_t seen_bytes, expected_bytes;  ///< of a message
  uint64_t ready;                       ///< written last
};

/// In host memory that the device maps: the two sides tell each other why to stop.
struct Board {
  uint64_t abort;    ///< from the host: leave
  uint64_t gone;     ///< from the host: a bit for each rank that has closed its communicator
  uint64_t left_at;  ///< from the device: sequence number of the first call that was left before its end, 0: none
  Report report;
};

/// How a wait may end without what it waits for.
struct Watch {
  Board* board;
  uint64_t* stop;  ///< in device memory: some block of this device has given up
  uint64_t timeout_ns;
};

/// The call, this rank, and how to reach the others.
struct Fabric {
  Layout layout;
  Watch watch;
  std::byte* const* arenas;  ///< by rank, as mapped on this device
  uint64_t signature[kWords];
  int32_t rank;
};

struct Instruction;
struct Operand;

/// A Plan's tables in device memory (see tables.h), and what they work on.
struct InterpreterArguments {
  Fabric fabric;
  const Instruction* instructions;
  const Operand* operands;
  const int32_t* level_begin;
  int32_t tiles, stride, lag, levels, in_flight;
  int32_t grain;              ///< parts of a chunk are multiples of it, in elements
  size_t slot_bytes;          ///< of scratch, for one tile
  size_t tile_scratch_bytes;  ///< of all slots
  std::byte* scratch;
  const std::byte* input;
  std::byte* output;
  ReduceOp op;
  int32_t divisor;
};

struct ShotArguments {
  Fabric fabric;
  const std::byte* input;
  std::byte* output;
  uint64_t count;  ///< elements
  ReduceOp op;
  int32_t divisor;
  bool two;  ///< two-shot
};

/// Waits until peers have read all that this rank sent them.
struct DrainArguments {
  Fabric fabric;
};

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
