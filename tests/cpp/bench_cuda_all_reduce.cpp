// How long the rig takes for 1 MiB of float32 on 4 emulated devices: bench_cuda_all_reduce [KiB] [repeats] [limit in
// ms]. Ends with 1 where the median of a schedule is above the limit (30 ms). It says nothing of a GPU's speed.
#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "device_rounds.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

constexpr int kRanks = 4;

/// Milliseconds of each repeat, as rank 0 sees them.
std::vector<double> measure(const World& world, size_t count, int repeats) {
  DeviceOptions options = emulated::default_options();
  options.staging_bytes = std::max(options.staging_bytes, count * sizeof(float));
  DeviceWorld devices(kRanks, options);
  std::vector<double> times;
  run_threads(kRanks, [&](int rank) {
    const DeviceStream stream(rank);
    const int program = devices[rank].add_program(world.programs[static_cast<size_t>(rank)]);
    const DeviceBuffer input(summands(count, {rank}, 0)), output(Bytes(count * sizeof(float)));
    Call call;
    call.program = program;
    call.dtype = DType::float32;
    call.count = count;
    call.input = input.data();
    call.output = output.data();
    for (int i = -2; i < repeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      devices[rank].submit_device(call, stream.number())->wait();
      const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
      if (rank == 0 && i >= 0) times.push_back(took.count());
    }
    CHECK(output.bytes() == summands(count, {0, 1, 2, 3}, 0));
  });
  std::sort(times.begin(), times.end());
  return times;
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  const size_t kib = static_cast<size_t>(argument(1, 1024));
  const int repeats = argument(2, 21), limit = argument(3, 30);
  const std::vector<World> worlds = load_worlds();
  bool in_time = true;
  for (const char* name : {"all_reduce.ring", "all_reduce.direct", "all_reduce.one_shot", "all_reduce.ordered"}) {
    const auto times = measure(find_world(worlds, name, kRanks), kib * 1024 / sizeof(float), repeats);
    const double median = times[times.size() / 2];
    in_time &= median <= limit;
    std::printf("%-20s %zu KiB, %d emulated devices: median %.1f ms, least %.1f, most %.1f\n", name, kib, kRanks,
                median, times.front(), times.back());
  }
  return in_time ? 0 : 1;
}
