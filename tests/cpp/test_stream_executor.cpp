// The stream executor on emulated devices: every algorithm gives the bits that the host executor gives.
#include "cuda/stream_executor.h"

#include <chrono>

#include "devices.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

constexpr size_t kOneIn = kSanitized ? 11 : 1;

/// Lengths that no chunk, tile, vector or block divides; several tiles a channel in the last.
std::vector<std::vector<size_t>> cases_of(const World& world, DType dtype) {
  const auto n = static_cast<size_t>(world.size);
  const size_t many = 40'000 / size_of(dtype) + 13;
  if (world.collective() == Collective::barrier) return {{0}};
  if (!world.by_block()) return {{n - 1}, {1009}, {many}};
  std::vector<size_t> uneven(n, 701);
  uneven[0] = 0;
  uneven[n - 1] = 3001;
  return {std::vector<size_t>(n, 1), uneven, std::vector<size_t>(n, many / n)};
}

class Bits {
 public:
  explicit Bits(DeviceWorld& devices) : devices_(devices) {}

  /// On one rank; all ranks call it with the same arguments.
  void compare(const World& world, int rank, int program, const std::vector<size_t>& blocks, DType dtype, ReduceOp op,
               bool in_place, const DeviceStream& stream, size_t shift) {
    Communicator& comm = devices_[rank];
    const RankData data = make_data(world, rank, blocks, dtype, op, in_place, blocks.back() + 7);
    const Bytes expected = run_on_host(comm, program, data);
    const Bytes got = run_on_device(comm, program, data, stream, shift);
    if (!data.has_output || same_elements(dtype, expected, got)) return;
    fail(__FILE__, __LINE__,
         world.label() + " rank " + std::to_string(rank) + ": " + name_of(op) + " of " + name_of(dtype) + " x " +
             std::to_string(data.call.count) + (in_place ? ", in place" : "") + ", shifted by " +
             std::to_string(shift) + " bytes: other bits than the host's");
  }

  /// Every dtype on every algorithm of this size, in turn with every operator.
  void all_algorithms(const std::vector<World>& worlds, int rank, const DeviceStream& stream) {
    size_t turn = 0;
    for (const World& world : worlds) {
      const int program = add(world, rank);
      for (int d = 0; d < kDTypes; ++d) {
        const auto dtype = static_cast<DType>(d);
        const std::vector<ReduceOp> ops = ops_of(dtype);
        for (const auto& blocks : cases_of(world, dtype))
          for (const bool in_place : {false, true}) {
            if (in_place && !allows_in_place(world.collective())) continue;
            ++turn;
            if (turn % kOneIn != 0) continue;
            const size_t shift = turn % 3 == 0 ? size_of(dtype) : 0;
            compare(world, rank, program, blocks, dtype, ops[turn % ops.size()], in_place, stream, shift);
          }
      }
    }
  }

  /// Every operator on every dtype, by the interpreter and by both kernels for short all-reduces.
  void all_operators(const std::vector<World>& worlds, int rank, const DeviceStream& stream) {
    for (const World& world : worlds) {
      if (world.name != "all_reduce.ring" && world.name != "all_reduce.one_shot" && world.name != "all_reduce.ordered")
        continue;
      const int program = add(world, rank);
      for (int d = 0; d < kDTypes; ++d)
        for (const ReduceOp op : ops_of(static_cast<DType>(d)))
          for (const size_t shift : {size_t{0}, size_of(static_cast<DType>(d))})
            compare(world, rank, program, {1531}, static_cast<DType>(d), op, false, stream, shift);
    }
  }

 private:
  int add(const World& world, int rank) {
    return devices_[rank].add_program(world.programs[static_cast<size_t>(rank)]);
  }

  DeviceWorld& devices_;
};

std::vector<World> of_size(const std::vector<World>& worlds, int n) {
  std::vector<World> found;
  for (const World& world : worlds)
    if (world.size == n) found.push_back(world);
  return found;
}

void test_bits(const std::vector<World>& worlds) {
  for (const int n : {2, 3, 4, 8}) {
    const auto start = std::chrono::steady_clock::now();
    const std::vector<World> of_n = of_size(worlds, n);
    DeviceWorld devices(n);
    Bits bits(devices);
    run_threads(n, [&](int rank) {
      const DeviceStream stream(rank);
      bits.all_algorithms(of_n, rank, stream);
      bits.all_operators(of_n, rank, stream);
    });
    std::printf("%d ranks: %.1f s\n", n,
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
}

/// Rank 0 sends its data twice in one instruction, and rank 1 adds both in one: x1 + x0 + x0.
World twice() {
  World world;
  world.name = "reduce.twice";
  world.size = 2;
  const Region data{BufferId::data, 0, 1};
  for (int rank = 0; rank < 2; ++rank) {
    Program program;
    program.name = "twice";
    program.collective = Collective::reduce;
    program.rank = rank;
    program.world_size = 2;
    program.root = 1;
    program.scratch_chunks = 2;
    program.volume = 2;
    program.levels = 1;
    program.pair_depth = 2;
    for (int copy = 0; copy < 2; ++copy) {
      Op op;
      op.kind = rank == 0 ? OpKind::send : OpKind::recv;
      op.src = data;
      op.dst = {BufferId::scratch, copy, 1};
      op.peer = 1 - rank;
      op.level = 1;
      program.ops.push_back(op);
    }
    for (int copy = 0; rank == 1 && copy < 2; ++copy) {
      Op op;
      op.kind = OpKind::reduce;
      op.src = {BufferId::scratch, copy, 1};
      op.dst = data;
      op.level = 1;
      op.final = copy == 1;
      program.ops.push_back(op);
    }
    world.programs.push_back(program);
  }
  return world;
}

/// Several messages of one pair in one instruction, in rings that they wrap around in.
void test_messages_of_one_instruction() {
  const World world = twice();
  DeviceOptions options = small_device();
  options.ring_bytes = 24 << 10;
  DeviceWorld devices(2, options);
  Bits bits(devices);
  run_threads(2, [&](int rank) {
    const DeviceStream stream(rank);
    const int program = devices[rank].add_program(world.programs[static_cast<size_t>(rank)]);
    for (int round = 0; round < 5; ++round)
      bits.compare(world, rank, program, {30'011}, DType::float32, ReduceOp::avg, false, stream, 0);
  });
}

/// More shapes than the device keeps tables of.
void test_many_shapes(const std::vector<World>& worlds) {
  const World& world = find_world(worlds, "all_reduce.ring", 2);
  DeviceWorld devices(2);
  Bits bits(devices);
  run_threads(2, [&](int rank) {
    const DeviceStream stream(rank);
    const int program = devices[rank].add_program(world.programs[static_cast<size_t>(rank)]);
    for (size_t count = 1; count < 600; ++count)
      bits.compare(world, rank, program, {count}, DType::uint8, ReduceOp::sum, true, stream, 0);
  });
}

/// No elements need no memory: null pointers, in every schedule.
void test_nothing(const std::vector<World>& worlds) {
  DeviceWorld devices(3);
  run_threads(3, [&](int rank) {
    const DeviceStream stream(rank);
    for (const World& world : of_size(worlds, 3)) {
      Call call;
      call.program = devices[rank].add_program(world.programs[static_cast<size_t>(rank)]);
      call.dtype = DType::float32;
      call.timeout_s = 10;
      devices[rank].submit_device(call, stream.number())->wait();
    }
  });
}

/// A ring that is too small for a schedule says so, on every rank, before anything is sent.
void test_small_ring(const std::vector<World>& worlds) {
  const World& world = find_world(worlds, "all_reduce.ring", 8);
  DeviceOptions options = small_device();
  options.ring_bytes = 4 << 10;
  DeviceWorld devices(8, options);
  const DeviceStream stream(3);
  const DeviceBuffer buffer(Bytes(400'000));
  Call call;
  call.program = devices[3].add_program(world.programs[3]);
  call.dtype = DType::float32;
  call.count = 100'000;
  call.input = call.output = buffer.data();
  CHECK_THROWS(devices[3].submit_device(call, stream.number()), ErrorKind::schedule,
               "all_reduce[ring] #1 rank 3 (thread): up to ");
}

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  test_bits(worlds);
  test_messages_of_one_instruction();
  test_many_shapes(worlds);
  test_nothing(worlds);
  test_small_ring(worlds);
}
