// Seeded interleavings of every kernel. With ThreadSanitizer each must be without a report; the results must be right
// in any case. PARACOMM_SEEDS says how many (`make races-cuda`: 1,000).
#include <cstdlib>

#include "device_rounds.h"

using namespace paracomm;
using namespace paracomm_test;

int main() {
  const std::vector<World> worlds = load_worlds();
  const char* const given = std::getenv("PARACOMM_SEEDS");
  const int seeds = given == nullptr ? 20 : std::atoi(given);
  CHECK(seeds > 0);
  // Messages in a chain, messages in scratch, sums of many sources, and both kernels without messages.
  const std::vector<Rounds> cases{
      {.schedule = "all_reduce.ring", .ranks = 3, .count = 6007, .rounds = 2, .ahead = 2},
      {.schedule = "all_reduce.halving_doubling", .ranks = 2, .count = 6007, .rounds = 2, .ahead = 2},
      {.schedule = "all_reduce.double_tree", .ranks = 3, .count = 3001, .rounds = 2, .ahead = 2},
      {.schedule = "broadcast.chain", .ranks = 3, .count = 6007, .rounds = 3, .ahead = 3},
      {.schedule = "all_reduce.one_shot", .ranks = 3, .count = 3001, .rounds = 3, .ahead = 3},
      {.schedule = "all_reduce.ordered", .ranks = 3, .count = 6007, .rounds = 3, .ahead = 3},
  };
  for (int seed = 1; seed <= seeds; ++seed) {
    emulator::set_seed(static_cast<uint64_t>(seed));
    Rounds rounds = cases[static_cast<size_t>(seed) % cases.size()];
    rounds.options = few_threads();
    rounds.timeout_s = 60;
    run_rounds(worlds, rounds);
  }
  std::printf("%d interleavings, all right\n", seeds);
}
