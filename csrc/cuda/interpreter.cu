// One kernel for every schedule: it runs a Plan's instructions as tables say.
//
// A block is a channel. Channel c of C runs tiles c, c + C, c + 2C, ... in the order of Plan::in_order over its own
// tiles. Per instruction: some threads wait, one a message, until each message that comes in is there and each ring
// that a message goes into has room; the block combines the sources and writes the value to where it is needed, which
// is this rank's memory and the rings of peers; then flags tell the receivers, and credits tell the senders that their
// bytes were read. Two barriers an instruction:
//
//     wait for flags and credits | barrier | combine, move cursors | barrier | write flags and credits
//
// Why nobody waits for ever: an instruction at time T (see Plan) waits for messages that left before T, and for room
// that messages leave which are taken before T, because the rings hold all that leaves within `lag` + 1 times (see
// tables.cu).
#include "cuda/combine.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/tables.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {
namespace {

using Arguments = InterpreterArguments;

/// A tile of this channel's.
struct Tile {
  int64_t local;  ///< number among this channel's
  int32_t index;  ///< number among all
};

__device__ __forceinline__ uint64_t ring_units(const Fabric& fabric) { return fabric.layout.ring_bytes / kUnit; }
__device__ __forceinline__ uint64_t units_of(size_t nbytes) { return (nbytes + kUnit - 1) / kUnit; }

/// Moves the cursor over a message of `units`, and returns where it begins. None wraps around the ring's end.
__device__ __forceinline__ uint64_t take_room(Cursor& cursor, uint64_t units, uint64_t ring) {
  const uint64_t at = cursor.head % ring;
  if (at + units > ring && !PARACOMM_PLANTED(Plant::ring_skips_end)) cursor.head += ring - at;
  const uint64_t begin = cursor.head % ring;
  cursor.head += units;
  ++cursor.number;
  return begin;
}

/// Plan::part.
__device__ __forceinline__ uint64_t part(const Arguments& args, uint64_t count, int32_t tile) {
  if (tile == args.tiles) return count;
  const auto grain = static_cast<uint64_t>(args.grain);
  return count * static_cast<uint64_t>(tile) / static_cast<uint64_t>(args.tiles) / grain * grain;
}

template <class E>
__device__ __forceinline__ std::byte* local_address(const Arguments& args, const Operand& operand, const Tile& tile) {
  if (operand.where == Where::scratch) {
    const int64_t turn = PARACOMM_PLANTED(Plant::scratch_shared_by_tiles) ? 0 : tile.local % args.in_flight;
    const auto copy =
        static_cast<uint64_t>(blockIdx.x) * static_cast<uint64_t>(args.in_flight) + static_cast<uint64_t>(turn);
    return args.scratch + copy * args.tile_scratch_bytes + operand.offset;
  }
  std::byte* const base = operand.where == Where::input ? const_cast<std::byte*>(args.input) : args.output;
  return base + operand.offset + part(args, operand.count, tile.index) * sizeof(typename E::Stored);
}

/// Waits for a message and says where it lies.
__device__ inline const std::byte* receive(Block& block, const Fabric& fabric, const Operand& operand, size_t nbytes,
                                           const Spot& spot, int j) {
  const int channel = static_cast<int>(blockIdx.x);
  std::byte* const own = block.arenas[fabric.rank];
  Cursor cursor = block.received[operand.peer];
  uint64_t begin = 0;
  for (int k = 0; k <= operand.ordinal; ++k) begin = take_room(cursor, units_of(nbytes), ring_units(fabric));

  auto* const slots = reinterpret_cast<Flag*>(own + fabric.layout.inbox(channel, operand.peer));
  const Flag& flag = slots[(cursor.number - 1) % kSlots];
  const uint64_t expected = cursor.number - (PARACOMM_PLANTED(Plant::stale_number) ? 1 : 0);
  const auto arrived = [&] {
    if (PARACOMM_PLANTED(Plant::receive_without_wait)) return true;
    if (PARACOMM_PLANTED(Plant::receive_relaxed)) return load_relaxed(&flag.number) >= expected;
    return load_acquire(&flag.number) >= expected;
  };
  if (wait_until(block, fabric, spot, arrived)) is_same_call(block, fabric, flag, spot);

  // Of several messages from one peer only the last gives credit: another's might come later and say less.
  block.flags[j] =
      operand.last ? word_at(block.arenas[operand.peer], fabric.layout.credit(channel, fabric.rank)) : nullptr;
  block.numbers[j] = cursor.number << 32 | (cursor.head & 0xffffffffu);
  if (PARACOMM_PLANTED(Plant::credit_too_early) && operand.last) store_release(block.flags[j], block.numbers[j]);
  return own + fabric.layout.ring(channel, operand.peer) + begin * kUnit;
}

/// Waits for room in a peer's ring and says where it is. The flag is this rank's as soon as there is room.
__device__ inline std::byte* reserve(Block& block, const Fabric& fabric, const Operand& operand, size_t nbytes,
                                     const Spot& spot, int j) {
  const int channel = static_cast<int>(blockIdx.x);
  std::byte* const peer = block.arenas[operand.peer];
  Cursor cursor = block.sent[operand.peer];
  uint64_t begin = 0;
  for (int k = 0; k <= operand.ordinal; ++k) begin = take_room(cursor, units_of(nbytes), ring_units(fabric));

  const uint64_t* const credit = word_at(block.arenas[fabric.rank], fabric.layout.credit(channel, operand.peer));
  const auto has_room = [&] {
    if (PARACOMM_PLANTED(Plant::send_without_credit)) return true;
    const uint64_t read = PARACOMM_PLANTED(Plant::credit_read_relaxed) ? load_relaxed(credit) : load_acquire(credit);
    const auto under_way = static_cast<uint32_t>(cursor.number) - static_cast<uint32_t>(read >> 32);
    const auto units = static_cast<uint32_t>(cursor.head) - static_cast<uint32_t>(read);
    return (under_way <= kSlots || PARACOMM_PLANTED(Plant::send_without_slots)) && units <= ring_units(fabric);
  };
  auto* const slots = reinterpret_cast<Flag*>(peer + fabric.layout.inbox(channel, fabric.rank));
  Flag& flag = slots[(cursor.number - 1) % kSlots];
  if (wait_until(block, fabric, spot, has_room)) {
    for (int i = 0; i < kWords; ++i) flag.signature[i] = fabric.signature[i];
    flag.nbytes = nbytes;
  }
  block.flags[j] = &flag.number;
  block.numbers[j] = cursor.number;
  return peer + fabric.layout.ring(channel, fabric.rank) + begin * kUnit;
}

/// All addresses of an instruction, once they may be used. One thread an operand.
template <class E>
__device__ __forceinline__ void find_operands(Block& block, const Arguments& args, const Instruction& instruction,
                                              size_t nbytes, const Tile& tile) {
  const auto index = static_cast<int>(&instruction - args.instructions);
  const int all = instruction.sources + instruction.destinations;
  for (int j = static_cast<int>(threadIdx.x); j < all; j += static_cast<int>(blockDim.x)) {
    const Operand operand = args.operands[instruction.first_operand + j];
    // Where there are no elements, a local address may be null.
    const bool local = operand.where != Where::message;
    if (local) block.flags[j] = nullptr;
    if (j < instruction.sources) {
      const Spot spot{Trouble::recv_timeout, operand.peer, index, tile.index, nbytes};
      block.sources[j] =
          local ? local_address<E>(args, operand, tile) : receive(block, args.fabric, operand, nbytes, spot, j);
    } else {
      const Spot spot{Trouble::send_timeout, operand.peer, index, tile.index};
      block.destinations[j - instruction.sources] =
          local ? local_address<E>(args, operand, tile) : reserve(block, args.fabric, operand, nbytes, spot, j);
    }
  }
}

/// Between the barriers nobody reads cursors.
__device__ inline void move_cursors(Block& block, const Arguments& args, const Instruction& instruction,
                                    size_t nbytes) {
  const int all = instruction.sources + instruction.destinations;
  for (int j = static_cast<int>(threadIdx.x); j < all; j += static_cast<int>(blockDim.x)) {
    const Operand operand = args.operands[instruction.first_operand + j];
    if (operand.where != Where::message || !operand.last) continue;
    Cursor& cursor = j < instruction.sources ? block.received[operand.peer] : block.sent[operand.peer];
    for (int k = 0; k <= operand.ordinal; ++k) take_room(cursor, units_of(nbytes), ring_units(args.fabric));
  }
}

__device__ inline void write_flags(const Block& block, const Instruction& instruction) {
  const int all = instruction.sources + instruction.destinations;
  for (int j = static_cast<int>(threadIdx.x); j < all; j += static_cast<int>(blockDim.x)) {
    if (block.flags[j] == nullptr) continue;
    const bool credit = j < instruction.sources;
    if (credit && (PARACOMM_PLANTED(Plant::no_credit) || PARACOMM_PLANTED(Plant::credit_too_early))) continue;
    if (PARACOMM_PLANTED(credit ? Plant::credit_relaxed : Plant::publish_relaxed))
      store_relaxed(block.flags[j], block.numbers[j]);
    else
      store_release(block.flags[j], block.numbers[j]);
  }
}

template <class E>
__device__ __forceinline__ void move_data(const Block& block, const Arguments& args, const Instruction& instruction,
                                          size_t count) {
  const Lists lists{block, instruction.sources, instruction.destinations};
  if (instruction.sources == 1)
    copy<typename E::Stored>(lists, count);
  else
    reduce<E>(lists, count, args.op, instruction.final ? args.divisor : 1);
}

/// False: the block is to leave.
template <class E>
__device__ __forceinline__ bool execute(Block& block, const Arguments& args, const Instruction& instruction,
                                        const Tile& tile) {
  const uint64_t count = part(args, instruction.count, tile.index + 1) - part(args, instruction.count, tile.index);
  const size_t nbytes = count * sizeof(typename E::Stored);
  find_operands<E>(block, args, instruction, nbytes, tile);
  if (!PARACOMM_PLANTED(Plant::data_before_flag)) __syncthreads();
  if (block.stop != 0) return false;
  move_data<E>(block, args, instruction, count);
  move_cursors(block, args, instruction, nbytes);
  if (!PARACOMM_PLANTED(Plant::publish_before_data)) __syncthreads();
  write_flags(block, instruction);
  return true;
}

/// Plan::in_order over this channel's tiles.
template <class E>
__device__ __forceinline__ bool run_tiles(Block& block, const Arguments& args, int64_t tiles) {
  const int64_t last = static_cast<int64_t>(args.lag) * args.levels;
  for (int64_t time = 0; time <= (tiles - 1) * args.stride + last; ++time) {
    const int64_t newest = time / args.stride < tiles - 1 ? time / args.stride : tiles - 1;
    for (int64_t local = newest; local >= 0 && time - local * args.stride <= last; --local) {
      const int64_t since = time - local * args.stride;
      if (since % args.lag != 0) continue;
      const auto level = static_cast<int32_t>(since / args.lag);
      const Tile tile{local, static_cast<int32_t>(blockIdx.x + local * gridDim.x)};
      for (int32_t i = args.level_begin[level]; i < args.level_begin[level + 1]; ++i)
        if (!execute<E>(block, args, args.instructions[i], tile)) return false;
    }
  }
  return true;
}

__device__ inline void load_cursors(Block& block, const Fabric& fabric) {
  const std::byte* const own = fabric.arenas[fabric.rank];
  const int channel = static_cast<int>(blockIdx.x);
  for (int p = static_cast<int>(threadIdx.x); p < fabric.layout.world_size; p += static_cast<int>(blockDim.x)) {
    block.sent[p] = *reinterpret_cast<const Cursor*>(own + fabric.layout.sent(channel, p));
    block.received[p] = *reinterpret_cast<const Cursor*>(own + fabric.layout.received(channel, p));
  }
}

__device__ inline void store_cursors(const Block& block, const Fabric& fabric) {
  if (PARACOMM_PLANTED(Plant::cursor_not_kept)) return;
  std::byte* const own = fabric.arenas[fabric.rank];
  const int channel = static_cast<int>(blockIdx.x);
  for (int p = static_cast<int>(threadIdx.x); p < fabric.layout.world_size; p += static_cast<int>(blockDim.x)) {
    *reinterpret_cast<Cursor*>(own + fabric.layout.sent(channel, p)) = block.sent[p];
    *reinterpret_cast<Cursor*>(own + fabric.layout.received(channel, p)) = block.received[p];
  }
}

template <class E>
__global__ void __launch_bounds__(kMaxThreads, 1) interpret(const __grid_constant__ Arguments args) {
  __shared__ Block block;
  load_cursors(block, args.fabric);
  if (!begin(block, args.fabric)) return;
  const int64_t tiles = (args.tiles - static_cast<int64_t>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  if (run_tiles<E>(block, args, tiles)) store_cursors(block, args.fabric);
}

}  // namespace

cudaError_t launch_interpreter(const InterpreterArguments& args, DType dtype, int blocks, int threads,
                               cudaStream_t stream) {
  return with_element(
      dtype, [&](auto element) { return launch(interpret<decltype(element)>, blocks, threads, stream, args); });
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
