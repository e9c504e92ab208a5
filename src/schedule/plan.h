// A Program bound to counts, dtype and slice size: fused instructions in a static order.
//
// One instruction does it all: combine `sources` (local regions, messages) and put the value into a local region and
// into messages. Send, recv, reduce and copy are its special cases, and a chain such as recv-reduce-store-send is one
// pass.
//
// Order. The chunks are cut into `tiles` slices each. Instruction i runs on tile t at time t * stride + lag * level(i);
// a message of level p leaves at the time of level p - 1 and is taken at that of level p. Levels grow along every
// dependency over all ranks, therefore the earliest unfinished instruction can always run, both ends of a pair see
// their messages in the same order, and several tiles are under way at once (software pipelining) without any
// bookkeeping at run time. `lag` is how many tiles a rank may be ahead of the peers that it waits for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "schedule/program.h"

namespace paracomm {

/// What the bytes of a collective look like on this rank. Equal on all ranks but for all_to_all's blocks.
struct Shape {
  std::vector<size_t>
      blocks;  ///< elements: {count}, or one entry a rank where each rank has a block (input of all_to_all)
  std::vector<size_t> output_blocks;  ///< all_to_all: what each rank sends here; empty otherwise
  DType dtype = DType::uint8;
  size_t window_bytes = 1 << 20;  ///< the most that one rank sends per tile
  int32_t lag = 1;           ///< the most times between a message's leaving and its being taken; equal on all ranks
  size_t largest_chunk = 0;  ///< all_to_all: elements of the largest chunk over all ranks (tiles must agree)
};

enum class Memory : uint8_t { input, output, scratch };

/// `count` chunks at a place: where chunk `chunk` of that memory begins follows from the plan.
struct Place {
  Memory memory = Memory::input;
  int32_t chunk = 0;  ///< chunk of the layout, or scratch slot

  friend bool operator==(const Place&, const Place&) = default;
};

struct Source {
  int32_t peer = -1;  ///< a message from this rank; -1: local
  Place place;        ///< local
};

struct Destination {
  int32_t peer = -1;
  int32_t record = -1;  ///< number among all messages of a tile
  bool copied = false;  ///< overwritten no later than the peer takes it: it must not leave from the caller's memory
  int32_t remote_chunk = -1;  ///< chunk of the peer's output that may be written directly, -1: none
};

struct Instruction {
  int32_t level = 0;
  int32_t size_chunk = 0;  ///< chunks whose size is moved
  int32_t span = 1;
  bool store = false;  ///< somebody on this rank reads `place` later, or it is part of the result
  bool has_place = false;
  bool final = false;  ///< avg divides here
  Place place;
  std::vector<Source> sources;
  std::vector<Destination> sends;
  std::vector<int32_t> after_sends;  ///< instructions whose messages must have left before `place` is overwritten
};

class Plan {
 public:
  /// Throws Error(schedule) if the program cannot be bound (reads what nobody wrote, overruns the queue of a pair),
  /// Error(invalid_argument) for blocks that do not fit it. The program passes check_ranges().
  Plan(const Program& program, const Shape& shape);

  const std::vector<Instruction>& instructions() const noexcept { return instructions_; }
  int32_t tiles() const noexcept { return tiles_; }
  int32_t stride() const noexcept { return stride_; }
  int32_t lag() const noexcept { return lag_; }
  int32_t levels() const noexcept { return levels_; }
  int32_t in_flight() const noexcept { return in_flight_; }  ///< tiles under way at once
  int32_t messages() const noexcept { return messages_; }    ///< sent per tile
  bool reads_input() const noexcept { return reads_input_; }
  bool writes_output() const noexcept { return writes_output_; }
  /// Calls run(instruction, tile) for everything that there is to do, in order.
  template <class Run>
  void in_order(Run run) const {
    if (tiles_ == 1) {
      for (const Instruction& instruction : instructions_) run(instruction, 0);
      return;
    }
    const int64_t last = static_cast<int64_t>(lag_) * levels_;
    for (int64_t time = 0; time <= (tiles_ - int64_t{1}) * stride_ + last; ++time) {
      for (int64_t tile = std::min<int64_t>(tiles_ - 1, time / stride_); tile >= 0 && time - tile * stride_ <= last;
           --tile) {
        const int64_t since = time - tile * stride_;
        if (since % lag_ != 0) continue;
        const auto level = static_cast<int32_t>(since / lag_);
        for (int32_t i = level_begin(level); i < level_begin(level + 1); ++i)
          run(instructions_[static_cast<size_t>(i)], static_cast<int32_t>(tile));
      }
    }
  }
  /// Instructions of level l: [level_begin(l), level_begin(l + 1)).
  int32_t level_begin(int32_t level) const noexcept { return level_begin_[static_cast<size_t>(level)]; }
  size_t element_bytes() const noexcept { return element_; }
  size_t scratch_bytes() const noexcept { return static_cast<size_t>(scratch_slots_) * slot_bytes_; }

  /// Bytes from the start of the memory to tile `tile` of the place, whose size is that of `size_chunk`.
  size_t offset(const Place& place, int32_t size_chunk, int32_t tile) const noexcept;
  /// Bytes that an instruction moves in a tile.
  size_t nbytes(const Instruction& instruction, int32_t tile) const noexcept;

  /// The same for all tiles at once, for executors that cut by themselves.
  struct Extent {
    size_t offset = 0;  ///< bytes from the start of the memory to the chunk
    size_t count = 0;   ///< elements of the chunk, of which a tile has its part()
  };
  Extent extent(const Place& place, int32_t size_chunk) const noexcept;
  /// Elements that an instruction moves in all tiles.
  size_t count(const Instruction& instruction) const noexcept;
  /// Elements of a chunk of `count` before tile `tile`: count * tile / tiles, rounded down to `grain` elements.
  size_t part(size_t count, int32_t tile) const noexcept;
  size_t grain() const noexcept;
  size_t slot_bytes() const noexcept { return slot_bytes_; }
  int32_t scratch_slots() const noexcept { return scratch_slots_; }

  /// One line an instruction, for tests and for people.
  std::string dump() const;

 private:
  friend class PlanBuilder;
  struct Chunk {
    size_t offset = 0, count = 0;  ///< elements
  };
  const std::vector<Chunk>& sizes(const Instruction& instruction) const noexcept;

  std::vector<Instruction> instructions_;
  std::vector<Chunk> chunks_;         ///< layout of data (or input)
  std::vector<Chunk> output_chunks_;  ///< layout of output
  std::vector<Chunk> input_chunks_;   ///< layout of input
  std::vector<Chunk> size_chunks_;    ///< sizes by `size_chunk`
  size_t element_ = 1;
  size_t slot_bytes_ = 0;
  int32_t scratch_slots_ = 0;
  int32_t tiles_ = 1, stride_ = 1, lag_ = 1, levels_ = 0, in_flight_ = 1, messages_ = 0;
  bool reads_input_ = false, writes_output_ = false;
  std::vector<int32_t> level_begin_;
};

}  // namespace paracomm
