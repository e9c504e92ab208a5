// A Plan as the interpreter reads it: plain tables, made on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/layout.h"
#include "schedule/plan.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

enum class Where : int32_t { input, output, scratch, message };

/// A source or a destination.
struct Operand {
  Where where;
  int32_t peer;     ///< message
  int32_t ordinal;  ///< message: how many others of this peer come before it in this instruction
  int32_t last;     ///< message: none of this peer comes after it in this instruction
  uint64_t offset;  ///< memory: bytes to the chunk (scratch: to the slot)
  uint64_t count;   ///< memory: elements of the chunk
};

struct Instruction {
  int32_t first_operand;  ///< its sources, then its destinations
  int32_t sources, destinations;
  int32_t final;   ///< avg divides here
  uint64_t count;  ///< elements in all tiles
};

struct Tables {
  std::vector<Instruction> instructions;
  std::vector<Operand> operands;
  std::vector<int32_t> level_begin;
  size_t slot_bytes = 0, tile_scratch_bytes = 0;  ///< for one tile
};

/// What a rank sends per tile, so that all that may be under way fits the rings: a Shape's window_bytes. Equal on all
/// ranks. `slice_bytes`: the most that a message ought to have; less where there are too few bytes for all channels.
size_t window_bytes(const Program& program, const Shape& shape, const Layout& layout, size_t slice_bytes);

/// Throws Error(schedule) if the plan's messages do not fit the rings, or an instruction has too many operands.
Tables make_tables(const Plan& plan, const Layout& layout);

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
