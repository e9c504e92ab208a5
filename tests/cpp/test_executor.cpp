// The executor: every algorithm over threads, shared memory, TCP and both, in one tile and in many.
#include "executor/host_executor.h"

#include "worlds.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

std::vector<std::vector<size_t>> cases_of(const World& world) {
  const auto n = static_cast<size_t>(world.size);
  if (world.collective() == Collective::barrier) return {{0}};
  if (!world.by_block()) return {{0}, {1}, {n + 1}, {1009}, {30'011}};
  std::vector<size_t> uneven(n, 700), large(n, 6'007);
  uneven[0] = 0;
  uneven[n - 1] = 3001;
  return {std::vector<size_t>(n, 0), std::vector<size_t>(n, 1), std::vector<size_t>(n, 65), uneven, large};
}

/// All algorithms of this size on one communicator, one after the other, so that what one leaves behind meets the next.
void run_all(Communicator& comm, const std::vector<World>& worlds, bool mapped) {
  for (const World& world : worlds) {
    if (world.size != comm.world_size()) continue;
    const int program = comm.add_program(world.programs[static_cast<size_t>(comm.rank())]);
    for (const auto& blocks : cases_of(world))
      for (const bool in_place : {false, true})
        if (!in_place || allows_in_place(world.collective())) run_case(comm, world, program, blocks, in_place, mapped);
  }
}

void test_threads(const std::vector<World>& worlds) {
  for (const int n : {2, 3, 5, 8}) {
    if (kSanitized && n > 3) break;
    for (const bool mapped : {false, true}) {
      const Comms comms = Communicator::local(n, small_windows());
      run_threads(n, [&](int rank) { run_all(*comms[static_cast<size_t>(rank)], worlds, mapped); });
    }
  }
}

/// `hosts(rank)`: ranks with equal ones share memory.
void test_processes(const std::vector<World>& worlds, int n, const std::function<std::string(int)>& host_of) {
  run_processes(n, [&](const Process& process) {
    CommOptions options = small_windows();
    options.sockets_per_peer = process.world_size == 3 ? 2 : 1;
    const auto comm = connect(process, host_of(process.rank), options);
    for (const bool mapped : {false, true}) run_all(*comm, worlds, mapped);
    CHECK(comm->seconds_waiting() >= 0);
    process.exchange("");  // nobody leaves before all are through
    comm->close();
  });
}

/// What a rank waits for is said where it waits: operation, number, rank, host, place.
void test_timeout_names_the_place(const std::vector<World>& worlds) {
  const Comms comms = Communicator::local(2, small_windows());
  std::vector<int> programs;
  const World& ring = find_world(worlds, "all_reduce.ring", 2);
  for (size_t r = 0; r < 2; ++r) programs.push_back(comms[r]->add_program(ring.programs[r]));
  std::vector<int32_t> x(100);
  Call call;
  call.program = programs[0];
  call.dtype = DType::int32;
  call.count = x.size();
  call.input = call.output = x.data();
  call.timeout_s = 0.02;
  CHECK_THROWS(comms[0]->run(call), ErrorKind::timeout, "all_reduce[ring] #1 rank 0 (thread) at op ");
  CHECK_THROWS(comms[0]->run(call), ErrorKind::timeout, "recv from rank 1 (thread) timed out after 0.02 s");
  CHECK_THROWS(comms[1]->run(call), ErrorKind::timeout, "rank 0 (thread) gave up");
}

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  for (const int n : {2, 3, 5}) {
    if (kSanitized && n > 3) break;
    test_processes(worlds, n, [](int) { return "here"; });
    test_processes(worlds, n, [](int rank) { return "host" + std::to_string(rank); });
  }
  test_processes(worlds, kSanitized ? 3 : 5, [](int rank) { return "host" + std::to_string(rank % 2); });
  if (!kSanitized) test_processes(worlds, 8, [](int rank) { return "host" + std::to_string(rank / 4); });
  test_threads(worlds);
  test_timeout_names_the_place(worlds);
}
