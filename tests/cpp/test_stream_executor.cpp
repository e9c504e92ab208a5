// The stream executor on emulated devices: every algorithm gives the bits that the host executor gives.
#include "cuda/stream_executor.h"

#include <chrono>

#include "devices.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

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
            const size_t shift = turn % 3 == 0 ? size_of(dtype) : 0;
            compare(world, rank, program, blocks, dtype, ops[turn++ % ops.size()], in_place, stream, shift);
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

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  test_bits(worlds);
}
