// Every fault that can be planted into the kernels is noticed: by a wrong result, by an error, by a call that does not
// end, or by ThreadSanitizer. Each runs in a process of its own, under one seed after the other, until it is caught;
// without a fault the same runs must pass. Weakened memory orders are ThreadSanitizer's alone to see on this processor.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "cuda/plant.h"
#include "device_rounds.h"

using namespace paracomm;
using namespace paracomm_test;
using emulated::Plant;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }
#else
constexpr bool kThreadSanitizer = false;
#endif

namespace {

constexpr int kSeeds = 12;
constexpr unsigned kStuck_s = kThreadSanitizer ? 20 : 6;

using Scenario = std::function<void(const std::vector<World>&)>;

struct Fault {
  Plant plant;
  const char* name;
  bool weak_order;  ///< nothing but ThreadSanitizer can see it
  Scenario scenario;
};

// --- what is run ---

/// Rings of a few messages, and many of them.
Rounds tight(const char* schedule, int ranks) {
  Rounds rounds{.schedule = schedule, .ranks = ranks, .count = 20'011, .rounds = 6, .ahead = 6};
  rounds.options = few_threads();
  rounds.options.channels = 1;
  rounds.options.ring_bytes = 24 << 10;
  rounds.timeout_s = kThreadSanitizer ? 8 : 2;
  return rounds;
}

Scenario chain() {
  return [](const std::vector<World>& worlds) { run_rounds(worlds, tight("broadcast.chain", 3)); };
}

Scenario ring() {
  return [](const std::vector<World>& worlds) {
    Rounds rounds = tight("all_reduce.ring", 3);
    rounds.options.ring_bytes = 64 << 10;
    run_rounds(worlds, rounds);
  };
}

/// Every pair has a ring, and behind its end begin the flags of the next.
Scenario all_pairs() {
  return [](const std::vector<World>& worlds) {
    Rounds rounds = tight("all_reduce.direct", 4);
    rounds.options.ring_bytes = 64 << 10;
    rounds.count = 60'013;
    run_rounds(worlds, rounds);
  };
}

/// Messages so short that flags, not bytes, are what a ring has too few of.
Scenario short_messages() {
  return [](const std::vector<World>& worlds) {
    Rounds rounds = tight("broadcast.direct", 2);
    rounds.count = 1;
    rounds.rounds = rounds.ahead = 400;
    rounds.late_rank = 0;  // the root is 1
    run_rounds(worlds, rounds);
  };
}

Scenario scratch() {
  return [](const std::vector<World>& worlds) {
    Rounds rounds = tight("all_reduce.recursive_doubling", 3);
    rounds.options.ring_bytes = 64 << 10;
    rounds.count = 40'009;
    run_rounds(worlds, rounds);
  };
}

Scenario shots(const char* schedule) {
  return [schedule](const std::vector<World>& worlds) {
    Rounds rounds = tight(schedule, 3);
    rounds.count = 6007;
    run_rounds(worlds, rounds);
  };
}

struct Pair {
  DeviceWorld devices{2, few_threads()};
  DeviceStream zero{0}, one{1};
  DeviceBuffer a{Bytes(8000)}, b{Bytes(8000)};
  int program[2];

  explicit Pair(const std::vector<World>& worlds, const char* schedule = "all_reduce.ring") {
    const World& world = find_world(worlds, schedule, 2);
    for (int r = 0; r < 2; ++r) program[r] = devices[r].add_program(world.programs[static_cast<size_t>(r)]);
  }
  Call call(int rank, size_t count, double timeout_s) const {
    Call call;
    call.program = program[rank];
    call.dtype = DType::float32;
    call.count = count;
    call.input = call.output = (rank == 0 ? a : b).data();
    call.timeout_s = timeout_s;
    return call;
  }
  std::shared_ptr<Work> submit(int rank, const Call& call) {
    return devices[rank].submit_device(call, (rank == 0 ? zero : one).number());
  }
  std::shared_ptr<Work> submit(int rank, size_t count, double timeout_s) {
    return submit(rank, call(rank, count, timeout_s));
  }
};

/// The error must come, be of this kind, and come soon.
void must_fail(const std::shared_ptr<Work>& work, ErrorKind kind) {
  const auto start = std::chrono::steady_clock::now();
  CHECK_THROWS(work->wait(), kind, "");
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::milliseconds(1500));
}

void mismatching_calls(const std::vector<World>& worlds) {
  Pair pair(worlds);
  const auto a = pair.submit(0, 1000, 10), b = pair.submit(1, 1001, 10);
  must_fail(a, ErrorKind::mismatch);
  must_fail(b, ErrorKind::mismatch);
}

/// Rank 1 sends more than rank 0 is told to expect.
void block_of_another_size(const std::vector<World>& worlds) {
  Pair pair(worlds, "all_to_all.direct");
  std::shared_ptr<Work> works[2];
  for (int rank = 0; rank < 2; ++rank) {
    Call call = pair.call(rank, 0, 10);
    call.output = static_cast<std::byte*>(call.output) + 4000;
    call.blocks = {rank == 1 ? size_t{300} : size_t{200}, 200};
    call.output_blocks = {200, 200};
    call.largest_block = 300;
    works[rank] = pair.submit(rank, call);
  }
  must_fail(works[0], ErrorKind::mismatch);
}

void peer_that_leaves(const std::vector<World>& worlds) {
  Pair pair(worlds);
  const auto work = pair.submit(0, 1000, 2);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  pair.devices[1].close();
  must_fail(work, ErrorKind::peer_lost);
}

void abort_of_a_peer(const std::vector<World>& worlds) {
  Pair pair(worlds);
  const auto work = pair.submit(0, 1000, 100);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  pair.devices[1].abort("planned");
  must_fail(work, ErrorKind::error);
}

void peer_that_does_not_come(const std::vector<World>& worlds) {
  Pair pair(worlds);
  must_fail(pair.submit(0, 1000, 0.2), ErrorKind::timeout);
}

/// The first thing that the kernel does is to wait in vain.
void root_that_does_not_come(const std::vector<World>& worlds) {
  Pair pair(worlds, "broadcast.direct");
  must_fail(pair.submit(0, 1000, 0.2), ErrorKind::timeout);
}

std::vector<Fault> all_faults() {
  const Scenario one_shot = shots("all_reduce.one_shot"), two_shot = shots("all_reduce.ordered");
  return {
      {Plant::send_without_credit, "send_without_credit", false, chain()},
      {Plant::send_without_slots, "send_without_slots", false, short_messages()},
      {Plant::credit_too_early, "credit_too_early", false, chain()},
      {Plant::no_credit, "no_credit", false, chain()},
      {Plant::receive_without_wait, "receive_without_wait", false, ring()},
      {Plant::receive_relaxed, "receive_relaxed", true, ring()},
      {Plant::publish_relaxed, "publish_relaxed", true, ring()},
      {Plant::credit_relaxed, "credit_relaxed", true, chain()},
      {Plant::credit_read_relaxed, "credit_read_relaxed", true, chain()},
      {Plant::publish_before_data, "publish_before_data", false, ring()},
      {Plant::data_before_flag, "data_before_flag", false, ring()},
      {Plant::stale_number, "stale_number", false, ring()},
      {Plant::cursor_not_kept, "cursor_not_kept", false, ring()},
      {Plant::ring_skips_end, "ring_skips_end", false, all_pairs()},
      {Plant::signature_not_compared, "signature_not_compared", false, mismatching_calls},
      {Plant::size_not_compared, "size_not_compared", false, block_of_another_size},
      {Plant::scratch_shared_by_tiles, "scratch_shared_by_tiles", false, scratch()},
      {Plant::stage_without_wait, "stage_without_wait", false, one_shot},
      {Plant::stage_relaxed, "stage_relaxed", true, one_shot},
      {Plant::stage_read_relaxed, "stage_read_relaxed", true, one_shot},
      {Plant::stage_before_data, "stage_before_data", false, two_shot},
      {Plant::stage_after_flag, "stage_after_flag", false, two_shot},
      {Plant::stage_one_buffer, "stage_one_buffer", false, one_shot},
      {Plant::stage_same_number, "stage_same_number", false, one_shot},
      {Plant::stage_skips_gather_wait, "stage_skips_gather_wait", false, two_shot},
      {Plant::stage_sources_unset, "stage_sources_unset", false, two_shot},
      {Plant::calls_not_kept, "calls_not_kept", false, one_shot},
      {Plant::begin_apart, "begin_apart", true, ring()},
      {Plant::leave_apart, "leave_apart", true, root_that_does_not_come},
      {Plant::report_relaxed, "report_relaxed", true, peer_that_does_not_come},
      {Plant::abort_not_seen, "abort_not_seen", false, abort_of_a_peer},
      {Plant::deadline_not_seen, "deadline_not_seen", false, peer_that_does_not_come},
      {Plant::gone_not_seen, "gone_not_seen", false, peer_that_leaves},
  };
}

// --- running it ---

/// How the process ended, in a word; empty: as if nothing were wrong.
std::string run_apart(const std::vector<World>& worlds, Plant plant, const Scenario& scenario, int seed) {
  std::fflush(nullptr);
  const int said = ::memfd_create("said", 0);
  CHECK(said >= 0);
  const pid_t child = ::fork();
  CHECK(child >= 0);
  if (child == 0) {
    ::dup2(said, STDERR_FILENO);
    ::alarm(kStuck_s);
    emulated::the_plant = plant;
    emulator::set_seed(static_cast<uint64_t>(seed));
    try {
      scenario(worlds);
    } catch (const std::exception& error) {
      fail(__FILE__, __LINE__, error.what());
    }
    ::_exit(0);
  }
  int status = 0;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  std::string text(static_cast<size_t>(::lseek(said, 0, SEEK_END)), '\0');
  CHECK_EQ(::pread(said, text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
  ::close(said);
  if (WIFSIGNALED(status)) return WTERMSIG(status) == SIGALRM ? "it does not end" : "signal";
  if (WEXITSTATUS(status) == 0) return "";
  for (const char* mark : {"ThreadSanitizer: data race", "FAILED: "})
    if (const size_t at = text.find(mark); at != std::string::npos) return text.substr(at, text.find('\n', at) - at);
  return "exit status " + std::to_string(WEXITSTATUS(status));
}

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  int caught = 0, left_to_tsan = 0, missed = 0;
  for (const Fault& fault : all_faults()) {
    for (const int seed : {1, 2})
      if (const std::string end = run_apart(worlds, Plant::none, fault.scenario, seed); !end.empty())
        fail(__FILE__, __LINE__, std::string("without a fault, where ") + fault.name + " is to be planted: " + end);
    if (fault.weak_order && !kThreadSanitizer) {
      ++left_to_tsan;
      continue;
    }
    std::string end;
    int seed = 0;
    while (end.empty() && seed < kSeeds) end = run_apart(worlds, fault.plant, fault.scenario, ++seed);
    end.empty() ? ++missed : ++caught;
    std::printf("%-24s %s%s\n", fault.name,
                end.empty() ? "NOT CAUGHT" : ("seed " + std::to_string(seed) + ": ").c_str(),
                end.substr(0, 150).c_str());
    std::fflush(stdout);
  }
  std::printf("%d faults caught, %d missed, %d left to ThreadSanitizer\n", caught, missed, left_to_tsan);
  return missed == 0 ? 0 : 1;
}
