// Rounds of collectives on devices that must give what they must: for interleavings, and for planted faults.
#pragma once

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cuda/emulator/control.h"
#include "devices.h"

namespace paracomm_test {

/// Whole numbers in float32, whose sum is exact in any order, and other ones in each round and on each rank.
inline float summand(size_t i, int rank, int round) {
  return static_cast<float>((i * 7 + static_cast<size_t>(round) * 31) % 1021) + static_cast<float>(rank * 2048);
}

inline Bytes summands(size_t count, const std::vector<int>& ranks, int round) {
  Bytes bytes(count * sizeof(float));
  for (size_t i = 0; i < count; ++i) {
    float value = 0;
    for (const int rank : ranks) value += summand(i, rank, round);
    std::memcpy(&bytes[i * sizeof value], &value, sizeof value);
  }
  return bytes;
}

struct Rounds {
  std::string schedule;
  int ranks = 2;
  size_t count = 0;
  int rounds = 1;
  int ahead = 1;       ///< operations that a rank submits before it waits for the first of them
  int late_rank = -1;  ///< this one comes later, so that others run ahead
  double timeout_s = 5;
  DeviceOptions options{};
};

/// Two warps' worth would hide little: barriers are between threads.
inline DeviceOptions few_threads() {
  DeviceOptions options = small_device();
  options.threads = 8;
  options.shot_blocks = 2;
  return options;
}

/// All ranks; a result that is not as it must be fails the test.
inline void run_rounds(const std::vector<World>& worlds, const Rounds& rounds) {
  const World& world = find_world(worlds, rounds.schedule, rounds.ranks);
  const bool broadcast = world.collective() == Collective::broadcast;
  std::vector<int> all;
  for (int r = 0; r < rounds.ranks; ++r) all.push_back(r);
  DeviceWorld devices(rounds.ranks, rounds.options);
  run_threads(rounds.ranks, [&](int rank) {
    const DeviceStream stream(rank);
    const int program = devices[rank].add_program(world.programs[static_cast<size_t>(rank)]);
    std::vector<std::unique_ptr<DeviceBuffer>> buffers;
    std::vector<std::shared_ptr<Work>> works;
    const auto finish = [&] {
      const auto round = static_cast<int>(buffers.size() - works.size());
      works.front()->wait();
      works.erase(works.begin());
      const Bytes right = summands(rounds.count, broadcast ? std::vector<int>{world.root()} : all, round);
      if (buffers[static_cast<size_t>(round)]->bytes() != right)
        fail(__FILE__, __LINE__,
             world.label() + " rank " + std::to_string(rank) + " round " + std::to_string(round) + ": wrong result");
      buffers[static_cast<size_t>(round)].reset();
    };
    for (int round = 0; round < rounds.rounds; ++round) {
      if (rank == rounds.late_rank && round % rounds.ahead == 0)
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      buffers.push_back(std::make_unique<DeviceBuffer>(summands(rounds.count, {rank}, round)));
      Call call;
      call.program = program;
      call.dtype = DType::float32;
      call.count = rounds.count;
      call.input = call.output = buffers.back()->data();
      call.timeout_s = rounds.timeout_s;
      works.push_back(devices[rank].submit_device(call, stream.number()));
      if (static_cast<int>(works.size()) >= rounds.ahead) finish();
    }
    while (!works.empty()) finish();
  });
}

}  // namespace paracomm_test
