// Communicators: one failure is everybody's, transfers between pairs, and ends of all kinds.
#include "comm/communicator.h"

#include <algorithm>
#include <atomic>
#include <random>

#include "worlds.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

/// What a rank's call ended with.
struct Ending {
  bool threw = false;
  ErrorKind kind = ErrorKind::error;
  std::string text;
};

template <class Function>
Ending ending_of(Function function) {
  try {
    function();
  } catch (const Error& error) {
    return {true, error.kind(), error.what()};
  }
  return {};
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

int add(Communicator& comm, const std::vector<World>& worlds, const std::string& name) {
  return comm.add_program(find_world(worlds, name, comm.world_size()).programs[static_cast<size_t>(comm.rank())]);
}

Call sum_of(int program, std::vector<int32_t>& x) {
  Call call;
  call.program = program;
  call.dtype = DType::int32;
  call.count = x.size();
  call.input = call.output = x.data();
  return call;
}

// --- one failure is everybody's ---
/// Ranks run `call(rank, buffer)` after two sums that work; all must throw. Memory outlives all ranks, as peers may
/// read it.
void test_all_throw(const std::vector<World>& worlds, int n, ErrorKind kind,
                    const std::function<void(Communicator&, Call, std::vector<int32_t>&)>& go) {
  const Comms comms = Communicator::local(n, small_windows());
  std::vector<std::vector<int32_t>> buffers(static_cast<size_t>(n), std::vector<int32_t>(9000, 1));
  std::vector<Ending> endings(static_cast<size_t>(n));
  run_threads(n, [&](int rank) {
    Communicator& comm = *comms[static_cast<size_t>(rank)];
    std::vector<int32_t>& x = buffers[static_cast<size_t>(rank)];
    const Call call = sum_of(add(comm, worlds, "all_reduce.ring"), x);
    for (int i = 0; i < 2; ++i) comm.run(call);
    endings[static_cast<size_t>(rank)] = ending_of([&] { go(comm, call, x); });
  });
  for (int rank = 0; rank < n; ++rank) {
    const Ending& ending = endings[static_cast<size_t>(rank)];
    if (!ending.threw || ending.kind != kind || !contains(ending.text, "rank " + std::to_string(rank)))
      fail(__FILE__, __LINE__, "rank " + std::to_string(rank) + ": " + (ending.threw ? ending.text : "did not throw"));
    Communicator& comm = *comms[static_cast<size_t>(rank)];
    CHECK_THROWS(comm.check(), kind, "rank ");
    CHECK_THROWS(comm.run(sum_of(0, buffers[0])), kind, "all_reduce[ring] #");
    CHECK_THROWS(comm.send(buffers[0].data(), 4, DType::int32, (rank + 1) % n, -1), kind, "send #1 rank ");
  }
}

void test_failures_reach_all(const std::vector<World>& worlds, int n) {
  const int last = n - 1;
  // One does not come: the others time out, and so does it when it comes.
  test_all_throw(worlds, n, ErrorKind::timeout, [&](Communicator& comm, Call call, std::vector<int32_t>&) {
    call.timeout_s = 0.05;
    if (comm.rank() == last) {
      while (!ending_of([&] { comm.check(); }).threw) std::this_thread::yield();
    }
    comm.run(call);
  });
  // One gives up while the others wait for it, asleep.
  test_all_throw(worlds, n, ErrorKind::error, [&](Communicator& comm, Call call, std::vector<int32_t>&) {
    if (comm.rank() == last) {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      comm.abort("rank " + std::to_string(last) + " has had enough");
    }
    comm.run(call);
  });
}

void test_one_leaves(const std::vector<World>& worlds, int n) {
  Comms comms = Communicator::local(n, small_windows());
  std::vector<std::vector<int32_t>> buffers(static_cast<size_t>(n), std::vector<int32_t>(9000, 1));
  run_threads(n, [&](int rank) {
    auto& comm = comms[static_cast<size_t>(rank)];
    const Call call = sum_of(add(*comm, worlds, "all_reduce.ring"), buffers[static_cast<size_t>(rank)]);
    comm->run(call);
    if (rank == 0) {
      comm.reset();
    } else {
      CHECK_THROWS(comm->run(call), ErrorKind::peer_lost, "all_reduce[ring] #2 rank " + std::to_string(rank));
    }
  });
}

void test_mismatches(const std::vector<World>& worlds, int n) {
  auto expect = [&](const char* what, const std::function<void(Communicator&, Call&)>& change) {
    Comms comms = Communicator::local(n, small_windows());
    std::vector<std::vector<int32_t>> buffers(static_cast<size_t>(n), std::vector<int32_t>(9000, 1));
    std::vector<Ending> endings(static_cast<size_t>(n));
    run_threads(n, [&](int rank) {
      Communicator& comm = *comms[static_cast<size_t>(rank)];
      Call call = sum_of(add(comm, worlds, "all_reduce.ring"), buffers[static_cast<size_t>(rank)]);
      add(comm, worlds, "all_reduce.one_shot");
      add(comm, worlds, "broadcast.binomial");
      if (rank == n - 1) change(comm, call);
      endings[static_cast<size_t>(rank)] = ending_of([&] { comm.run(call); });
    });
    bool told = false;
    for (const Ending& ending : endings) {
      if (!ending.threw || ending.kind != ErrorKind::mismatch)
        fail(__FILE__, __LINE__, std::string(what) + ": " + (ending.threw ? ending.text : "a rank did not throw"));
      told |= contains(ending.text, what);
    }
    CHECK(told);
  };
  expect("count", [](Communicator&, Call& call) { call.count -= 1; });
  expect("dtype", [](Communicator&, Call& call) { call.dtype = DType::float32; });
  expect("max", [](Communicator&, Call& call) { call.op = ReduceOp::max; });
  expect("schedule", [](Communicator&, Call& call) { call.program = 1; });
  expect("broadcast", [](Communicator&, Call& call) { call.program = 2; });
  expect("#2", [&](Communicator& comm, Call&) {  // it is one operation ahead
    Call bad;
    bad.program = 0;
    bad.count = 0;
    comm.submit(bad);
  });
}

void test_arguments(const std::vector<World>& worlds) {
  const Comms comms = Communicator::local(2, small_windows());
  const World& ring = find_world(worlds, "all_reduce.ring", 2);
  CHECK_THROWS(comms[0]->add_program(ring.programs[1]), ErrorKind::invalid_argument,
               "rank 1 of 2 given to rank 0 of 2");
  std::vector<int32_t> x(5);
  CHECK_THROWS(comms[0]->run(sum_of(0, x)), ErrorKind::invalid_argument, "no program 0");
  CHECK_THROWS(comms[0]->send(x.data(), 4, DType::int32, 0, -1), ErrorKind::invalid_argument, "send to rank 0");
  CHECK_THROWS(comms[0]->recv(x.data(), 4, DType::int32, 2, -1), ErrorKind::invalid_argument, "recv from rank 2");
  CHECK_THROWS(Communicator::local(0, {}), ErrorKind::invalid_argument, "expected 1 to 256");
  CHECK_THROWS(Communicator::local(257, {}), ErrorKind::invalid_argument, "is 257");
  CommOptions wide;
  wide.window_bytes = size_t{1} << 62;
  CHECK_THROWS(Communicator::local(2, wide), ErrorKind::invalid_argument, "window_bytes is 4611686018427387904");
  Call nowhere;
  nowhere.dtype = DType::int32;
  nowhere.count = 4;
  nowhere.program = add(*comms[0], worlds, "all_reduce.ring");
  CHECK_THROWS(comms[0]->run(nowhere), ErrorKind::invalid_argument, "no memory for its input");
  nowhere.input = x.data();
  CHECK_THROWS(comms[0]->run(nowhere), ErrorKind::invalid_argument, "no memory for its output");
  Call call = sum_of(add(*comms[0], worlds, "all_gather.ring"), x);
  CHECK_THROWS(comms[0]->run(call), ErrorKind::invalid_argument, "5 elements do not divide into 2 equal blocks");
  comms[0]->check();  // none of that was a failure
  CHECK_EQ(comms[0]->choose(Collective::all_reduce, -1, 100), -1);
  comms[0]->set_choice(Collective::all_reduce, -1, {{10, 3}, {1000, 4}});
  CHECK_EQ(comms[0]->choose(Collective::all_reduce, -1, 10), 3);
  CHECK_EQ(comms[0]->choose(Collective::all_reduce, -1, 11), 4);
  CHECK_EQ(comms[0]->choose(Collective::all_reduce, -1, 100'000), 4);
  CHECK_EQ(comms[0]->choose(Collective::broadcast, 1, 10), -1);
  CHECK_EQ(comms[0]->transport(1), "local");
  CHECK_EQ(comms[0]->transport(0), "self");
}

// --- transfers between pairs ---
size_t storm_bytes(int src, int dst, int i) {
  std::mt19937 random(static_cast<uint32_t>(src * 10'007 + dst * 101 + i));
  switch (random() % 4) {
    case 0:
      return 0;
    case 1:
      return random() % 64;
    case 2:
      return random() % 5000;
    default:
      return random() % 400'000;
  }
}
unsigned char storm_byte(int src, int dst, int i, size_t at) {
  return static_cast<unsigned char>(static_cast<size_t>(src * 31 + dst * 17 + i * 7) + at * 13 + at / 255);
}

/// Everybody posts sends and receives to and from everybody, in any order, and waits in another from several threads.
void storm(Communicator& comm, int messages) {
  struct Post {
    int peer, number;
    bool send;
  };
  const int rank = comm.rank(), n = comm.world_size();
  std::mt19937 random(static_cast<uint32_t>(rank) + 99);
  std::vector<std::vector<unsigned char>> buffers;
  std::vector<std::pair<std::shared_ptr<Work>, Post>> works;
  std::vector<int> sent(static_cast<size_t>(n)), received(sent);
  std::vector<Post> posts;
  for (int peer = 0; peer < n; ++peer)
    for (int i = 0; i < messages && peer != rank; ++i) {
      posts.push_back({peer, 0, true});
      posts.push_back({peer, 0, false});
    }
  std::shuffle(posts.begin(), posts.end(), random);
  buffers.reserve(posts.size());
  for (Post post : posts) {
    post.number = (post.send ? sent : received)[static_cast<size_t>(post.peer)]++;
    const int src = post.send ? rank : post.peer, dst = post.send ? post.peer : rank;
    auto& buffer = buffers.emplace_back(storm_bytes(src, dst, post.number));
    for (size_t at = 0; at < buffer.size() && post.send; ++at) buffer[at] = storm_byte(src, dst, post.number, at);
    works.emplace_back(post.send ? comm.send(buffer.data(), buffer.size(), DType::uint8, post.peer, -1)
                                 : comm.recv(buffer.data(), buffer.size(), DType::uint8, post.peer, -1),
                       post);
  }
  std::vector<std::thread> waiters;
  for (uint32_t t = 0; t < 2; ++t)
    waiters.emplace_back([works, t] {
      auto mine = works;
      std::shuffle(mine.begin(), mine.end(), std::mt19937(t));
      for (const auto& [work, post] : mine) work->wait();
    });
  for (std::thread& waiter : waiters) waiter.join();
  for (size_t i = 0; i < works.size(); ++i) {
    const Post post = works[i].second;
    for (size_t at = 0; at < buffers[i].size() && !post.send; ++at)
      CHECK_EQ(int{buffers[i][at]}, int{storm_byte(post.peer, rank, post.number, at)});
  }
}

/// Both sides send more than a queue or the staging ring holds before they receive.
void exchange_head_on(Communicator& comm, size_t nbytes, int messages) {
  const int peer = 1 - comm.rank();
  std::vector<unsigned char> out(nbytes, static_cast<unsigned char>(comm.rank() + 1));
  std::vector<std::vector<unsigned char>> in(static_cast<size_t>(messages), std::vector<unsigned char>(nbytes));
  std::vector<std::shared_ptr<Work>> works;
  for (int i = 0; i < messages; ++i) works.push_back(comm.send(out.data(), nbytes, DType::uint8, peer, -1));
  for (auto& buffer : in) works.push_back(comm.recv(buffer.data(), nbytes, DType::uint8, peer, -1));
  for (const auto& work : works) work->wait();
  for (const auto& buffer : in) CHECK(std::all_of(buffer.begin(), buffer.end(), [&](int b) { return b == peer + 1; }));
}

void test_pairs_over_threads() {
  for (const int n : {2, 5}) {
    const Comms comms = Communicator::local(n, small_windows());
    run_threads(n, [&](int rank) { storm(*comms[static_cast<size_t>(rank)], 30); });
  }
  const Comms comms = Communicator::local(2, small_windows());
  run_threads(2, [&](int rank) { exchange_head_on(*comms[static_cast<size_t>(rank)], 64, 300); });
}

void test_pairs_over_processes() {
  for (const bool tcp : {false, true}) {
    run_processes(2, [&](const Process& process) {
      CommOptions options = small_windows();
      options.timeout_s = 60;
      const auto comm = connect(process, tcp ? std::to_string(process.rank) : "here", options);
      for (const auto& [nbytes, messages] : {std::pair<size_t, int>{64, 300}, {4096, 300}, {300'000, 20}, {0, 300}})
        exchange_head_on(*comm, nbytes, messages);
      storm(*comm, 30);
      process.exchange("");
    });
  }
  run_processes(4, [](const Process& process) {
    const auto comm = connect(process, std::to_string(process.rank / 2));
    storm(*comm, 20);
    process.exchange("");
  });
}

/// A receive is posted while its message is being put aside for another one of a later tag.
void test_receive_of_a_message_under_way() {
  for (const bool tcp : {false, true}) {
    run_processes(2, [&](const Process& process) {
      CommOptions options = small_windows();
      options.timeout_s = 30;
      const auto comm = connect(process, tcp ? std::to_string(process.rank) : "here", options);
      std::vector<unsigned char> first(8 << 20), second(8);
      for (int round = 0; round < 20; ++round) {
        const auto value = static_cast<unsigned char>(round + 1);
        std::vector<std::shared_ptr<Work>> works;
        if (process.rank == 0) {
          std::fill(first.begin(), first.end(), value);
          works.push_back(comm->send(first.data(), first.size(), DType::uint8, 1, -1, 7));
          works.push_back(comm->send(second.data(), second.size(), DType::uint8, 1, -1, 8));
        } else {
          works.push_back(comm->recv(second.data(), second.size(), DType::uint8, 0, -1, 8));
          std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
          works.push_back(comm->recv(first.data(), first.size(), DType::uint8, round % 2 ? 0 : kAnyPeer, -1, 7));
        }
        for (const auto& work : works) work->wait();
        CHECK(std::all_of(first.begin(), first.end(), [&](int b) { return b == value; }));
        process.exchange("");
      }
    });
  }
}

void test_pair_failures() {
  int32_t here[4] = {1, 2, 3, 4}, there[4] = {};
  {
    const Comms comms = Communicator::local(2, small_windows());
    const auto sent = comms[0]->send(here, 16, DType::int32, 1, -1);
    const auto received = comms[1]->recv(there, 8, DType::int32, 0, -1);
    CHECK_THROWS(received->wait(), ErrorKind::mismatch, "recv #1 rank 1 (thread): recv from rank 0 (thread)");
  }
  {
    const Comms comms = Communicator::local(2, small_windows());
    const auto received = comms[1]->recv(there, 16, DType::int32, 0, 0.02);
    CHECK_THROWS(received->wait(), ErrorKind::timeout, "recv from rank 0 (thread) timed out");
    CHECK_THROWS(comms[0]->check(), ErrorKind::timeout, "rank 1 (thread) gave up");
  }
  {
    Comms comms = Communicator::local(2, small_windows());
    const auto received = comms[1]->recv(there, 16, DType::int32, 0, -1);
    comms[0].reset();
    CHECK_THROWS(received->wait(), ErrorKind::peer_lost, "recv #1 rank 1 (thread)");
  }
}

/// A communicator goes while a transfer that nobody answers is waited for; the peer, who needs nothing, stays in peace.
void test_close_during_a_transfer() {
  int32_t x[4] = {};
  for (int round = 0; round < 20; ++round) {
    Comms comms = Communicator::local(2, small_windows());
    const auto received = comms[0]->recv(x, 16, DType::int32, 1, -1);
    std::thread waiter([&] { CHECK_THROWS(received->wait(), ErrorKind::error, "closed"); });
    if (round % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    comms[0].reset();
    waiter.join();
    comms[1]->check();
  }
}

// --- ends ---
/// abort() from a watchdog while the owner closes.
void test_abort_races_close() {
  run_processes(2, [](const Process& process) {
    for (int round = 0; round < 20; ++round) {
      const auto comm = connect(process, "here");
      std::thread watchdog([&] { comm->abort("the watchdog barked"); });
      comm->close();
      watchdog.join();
      process.exchange("");
    }
  });
}

/// A data loader that was forked lets go of its parent's communicator, whose threads it does not have, and whose locks
/// those threads may hold at that moment.
void test_forked_child_lets_go(const std::vector<World>& worlds) {
  run_processes(2, [&](const Process& process) {
    auto comm = connect(process, "here");
    std::vector<int32_t> x(10, 1);
    const int program = add(*comm, worlds, "all_reduce.ring");
    const Call call = sum_of(program, x);
    for (int i = 0; i < 200; ++i) {
      auto work = comm->submit(call);
      int32_t y = 0;
      auto transfer =
          process.rank == 0 ? comm->send(&y, 4, DType::int32, 1, -1) : comm->recv(&y, 4, DType::int32, 0, -1);
      work->wait();
      transfer->wait();
      const pid_t child = ::fork();
      if (child == 0) {
        const char* why = "belongs to the parent process";
        CHECK_THROWS(comm->run(call), ErrorKind::error, why);
        CHECK_THROWS(comm->submit(call), ErrorKind::error, why);
        CHECK_THROWS(comm->send(&y, 4, DType::int32, 1 - process.rank, -1), ErrorKind::error, why);
        CHECK_THROWS(comm->check(), ErrorKind::error, why);
        CHECK_THROWS(comm->abort("no more"), ErrorKind::error, why);
        comm->close();
        work.reset();
        transfer.reset();
        comm.reset();
        ::_exit(0);
      }
      int status = -1;
      CHECK_EQ(::waitpid(child, &status, 0), child);
      CHECK_EQ(status, 0);
      x.assign(x.size(), 1);
      comm->run(call);  // the parent's is as good as before
      CHECK_EQ(x[0], 2);
      x.assign(x.size(), 1);
    }
    process.exchange("");
  });
}

/// A rank is killed in the middle of collectives: the others hear of it, whatever reaches them.
void test_killed_rank(const std::vector<World>& worlds, const std::function<std::string(int)>& host_of) {
  run_processes(5,
                [&](const Process& process) {
                  const auto comm = connect(process, host_of(process.rank));
                  const int program = add(*comm, worlds, "all_reduce.direct");
                  std::vector<int32_t> x(20'000, 1);
                  const Ending ending = ending_of([&] {
                    for (int i = 0;; ++i) {
                      if (process.rank == 1 && i == 20) ::raise(SIGKILL);
                      comm->run(sum_of(program, x));
                    }
                  });
                  if (ending.kind != ErrorKind::peer_lost || !contains(ending.text, "all_reduce[direct] #2") ||
                      !contains(ending.text, "rank 1 ("))
                    fail(__FILE__, __LINE__, ending.text);
                },
                {1});
}

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  test_abort_races_close();
  test_forked_child_lets_go(worlds);
  test_pairs_over_processes();
  test_receive_of_a_message_under_way();
  test_killed_rank(worlds, [](int) { return "here"; });
  test_killed_rank(worlds, [](int rank) { return std::to_string(rank); });
  test_killed_rank(worlds, [](int rank) { return std::to_string(rank % 2); });
  for (const int n : {2, 3, 5}) {
    test_failures_reach_all(worlds, n);
    test_one_leaves(worlds, n);
    test_mismatches(worlds, n);
  }
  test_arguments(worlds);
  test_pairs_over_threads();
  test_pair_failures();
  test_close_during_a_transfer();
}
