// Asynchronous operations: their order, who runs them, what their timeouts reach, and how they end with the
// communicator.
#include "comm/queue.h"

#include <algorithm>
#include <atomic>
#include <random>

#include "worlds.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

class Group {
 public:
  Group(const std::vector<World>& worlds, int n, const CommOptions& options = small_windows())
      : comms_(Communicator::local(n, options)) {
    for (const char* name : {"all_reduce.ring", "all_reduce.one_shot", "broadcast.binomial", "barrier.dissemination"}) {
      const World& world = find_world(worlds, name, n);
      int program = -1;
      for (int r = 0; r < n; ++r)
        program = comms_[static_cast<size_t>(r)]->add_program(world.programs[static_cast<size_t>(r)]);
      programs_.push_back(program);
    }
  }
  Communicator& operator[](int rank) { return *comms_[static_cast<size_t>(rank)]; }
  void drop(int rank) { comms_[static_cast<size_t>(rank)].reset(); }
  Call sum(std::vector<int32_t>& x, double timeout_s = -1) const {
    return call(programs_[x.size() > 2000 ? 0 : 1], x, timeout_s);
  }
  Call broadcast(std::vector<int32_t>& x) const { return call(programs_[2], x, -1); }
  Call barrier() const {
    Call meet;
    meet.program = programs_[3];
    return meet;
  }

 private:
  static Call call(int program, std::vector<int32_t>& x, double timeout_s) {
    Call call;
    call.program = program;
    call.dtype = DType::int32;
    call.count = x.size();
    call.input = call.output = x.data();
    call.timeout_s = timeout_s;
    return call;
  }
  Comms comms_;
  std::vector<int> programs_;
};

/// Every operation doubles (or triples) what the one before it left: any other order gives another value.
void test_order(const std::vector<World>& worlds, int n) {
  Group group(worlds, n);
  run_threads(n, [&](int rank) {
    std::vector<int32_t> x(100, rank == 1 ? 3 : 1), y(5000, 1);
    std::vector<std::shared_ptr<Work>> works;
    uint32_t expected = 3, other = 1;
    for (int i = 0; i < 12; ++i) {
      if (i == 0) works.push_back(group[rank].submit(group.broadcast(x)));
      works.push_back(group[rank].submit(group.sum(x)));
      works.push_back(group[rank].submit(group.sum(y)));
      expected *= static_cast<uint32_t>(n);
      other *= static_cast<uint32_t>(n);
    }
    if (rank % 2 == 0)
      works.back()->wait();  // runs all of them, in order
    else
      while (!works.back()->done()) std::this_thread::yield();  // the progress thread does
    for (const auto& work : works) CHECK(work->done() && work->error() == nullptr);
    CHECK(std::all_of(x.begin(), x.end(), [&](int32_t v) { return v == static_cast<int32_t>(expected); }));
    CHECK(std::all_of(y.begin(), y.end(), [&](int32_t v) { return v == static_cast<int32_t>(other); }));
    group[rank].run(group.barrier());
  });
}

/// An operation begins when the one before it has ended, whoever runs it; times are steady_clock's.
void test_times(const std::vector<World>& worlds) {
  const auto now_ns = [] {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  Group group(worlds, 2);
  run_threads(2, [&](int rank) {
    std::vector<int32_t> x(100, 1);
    std::vector<std::shared_ptr<Work>> works;
    int64_t before = now_ns();
    if (rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    const int64_t late = now_ns();
    for (int i = 0; i < 8; ++i) works.push_back(group[rank].submit(group.sum(x)));
    if (rank == 0)
      works.back()->wait();
    else
      while (!works.back()->done()) std::this_thread::yield();
    if (rank == 1) CHECK(works[0]->began_ns() >= late);
    for (const auto& work : works) {
      CHECK(before <= work->began_ns() && work->began_ns() <= work->ended_ns());
      before = work->ended_ns();
    }
    CHECK(before <= now_ns());
    const auto sent = rank == 0 ? group[0].send(x.data(), 400, DType::int32, 1, -1) : nullptr;
    const auto received = rank == 1 ? group[1].recv(x.data(), 400, DType::int32, 0, -1) : nullptr;
    Work& message = *(rank == 0 ? sent : received);
    message.wait();
    CHECK(before <= message.began_ns() && message.began_ns() <= message.ended_ns() && message.ended_ns() <= now_ns());
    group[rank].run(group.barrier());
  });
  std::vector<int32_t> x(100, 1);
  const auto alone = group[0].submit(group.sum(x));
  CHECK_EQ(alone->began_ns() + alone->ended_ns(), int64_t{0});  // the other rank has not come
  group.drop(0);
}

/// Several threads a rank wait for works of their own, in any order, while the main one runs collectives in between.
void test_many_waiters(const std::vector<World>& worlds) {
  constexpr int kWorks = 60;
  Group group(worlds, 3);
  run_threads(3, [&](int rank) {
    std::vector<std::vector<int32_t>> buffers;
    std::vector<std::shared_ptr<Work>> works;
    for (int i = 0; i < kWorks; ++i) buffers.emplace_back(i % 7 == 0 ? 9000 : 10 + i, i);
    std::vector<int32_t> own(50, 1);
    for (int i = 0; i < kWorks; ++i) {
      works.push_back(group[rank].submit(group.sum(buffers[static_cast<size_t>(i)])));
      if (i % 20 == 19) group[rank].run(group.sum(own));
    }
    std::vector<std::thread> waiters;
    for (uint32_t t = 0; t < 3; ++t)
      waiters.emplace_back([&works, t, rank] {
        std::vector<std::shared_ptr<Work>> mine = works;
        std::shuffle(mine.begin(), mine.end(), std::mt19937(t * 10 + static_cast<uint32_t>(rank)));
        for (const auto& work : mine) work->wait(t == 0 ? 200 : -1);
      });
    for (std::thread& waiter : waiters) waiter.join();
    for (int i = 0; i < kWorks; ++i) {
      const auto& buffer = buffers[static_cast<size_t>(i)];
      CHECK(std::all_of(buffer.begin(), buffer.end(), [&](int32_t v) { return v == 3 * i; }));
    }
    CHECK_EQ(own[0], 27);
  });
}

/// More shapes than the cache of plans holds, all of them queued before the first is waited for.
void test_plans_outlive_the_cache(const std::vector<World>& worlds) {
  constexpr size_t kShapes = 4200;
  Group group(worlds, 2);
  std::vector<int32_t> sums[2];  // of bytes, and operations on overlapping memory run one after the other
  run_threads(2, [&](int rank) {
    std::vector<int32_t>& x = sums[rank];
    x.assign(kShapes, 1);
    std::vector<std::shared_ptr<Work>> works;
    for (size_t count = 1; count <= kShapes; ++count) {
      Call call = group.sum(x);
      call.count = count;
      call.dtype = DType::uint8;
      call.input = call.output = x.data();
      works.push_back(group[rank].submit(call));
    }
    for (const auto& work : works) work->wait();
  });
  CHECK(sums[0] == sums[1]);
}

/// A short wait() bounds what it waits for and what runs before that, not what was queued after it.
void test_wait_limits_no_later_operation(const std::vector<World>& worlds) {
  Group group(worlds, 2);
  std::vector<int32_t> x[2], y[2];
  std::atomic<bool> waited{false};
  run_threads(2, [&](int rank) {
    x[rank].assign(10, 1);
    y[rank].assign(10, 1);
    if (rank == 0) {
      const auto first = group[rank].submit(group.sum(x[rank]));
      const auto second = group[rank].submit(group.sum(y[rank]));
      first->wait(2.0);
      waited = true;
      second->wait();
    } else {
      group[rank].run(group.sum(x[rank]));
      while (!waited) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::milliseconds(2200));  // past the limit of the first
      group[rank].run(group.sum(y[rank]));
    }
    CHECK_EQ(y[rank][0], 2);
  });
}

/// The peer does not come: wait() ends, and so does everybody else's, now and later.
void test_wait_times_out(const std::vector<World>& worlds, bool while_running) {
  Group group(worlds, 2);
  std::vector<int32_t> x(10), y(10);
  const auto first = group[0].submit(group.sum(x));
  const auto second = group[0].submit(group.sum(y));
  // Long enough for the progress thread to have begun; the outcome is the same if it has not.
  if (while_running) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_THROWS(first->wait(0.02), ErrorKind::timeout, "rank 0");
  CHECK_THROWS(first->wait(), ErrorKind::timeout, "rank 0");
  CHECK_THROWS(second->wait(), ErrorKind::timeout, "#2");
  CHECK(second->error() != nullptr);
  CHECK_THROWS(group[0].run(group.sum(x)), ErrorKind::timeout, "rank 0");
  CHECK_THROWS(group[1].submit(group.sum(x)), ErrorKind::timeout, "gave up");
}

/// The communicator goes while operations are queued and running, and while another thread waits for one.
void test_close_ends_everything(const std::vector<World>& worlds) {
  for (int round = 0; round < 4; ++round) {
    Group group(worlds, 2);
    std::vector<int32_t> x(10), y(10);
    const auto first = group[0].submit(group.sum(x));
    const auto second = group[0].submit(group.sum(y));
    std::thread waiter([&] { CHECK_THROWS(first->wait(), ErrorKind::error, "closed"); });
    if (round % 2 == 0) std::this_thread::yield();
    group.drop(0);
    waiter.join();
    CHECK_THROWS(second->wait(), ErrorKind::error, "closed");
    // What rank 0 had sent before it left may still serve the first operation, not the second.
    CHECK_THROWS((group[1].run(group.sum(y)), group[1].run(group.sum(y))), ErrorKind::peer_lost, "has closed");
  }
}

void test_closed() {
  const Comms comms = Communicator::local(1, small_windows());
  comms[0]->close();
  comms[0]->close();
  CHECK_THROWS(comms[0]->run(Call{}), ErrorKind::error, "closed");
  CHECK_THROWS(comms[0]->submit(Call{}), ErrorKind::error, "closed");
  CHECK_THROWS(comms[0]->check(), ErrorKind::error, "closed");
}

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  for (const int n : {2, 3, 8}) test_order(worlds, n);
  test_times(worlds);
  test_many_waiters(worlds);
  test_plans_outlive_the_cache(worlds);
  test_wait_limits_no_later_operation(worlds);
  for (const bool while_running : {false, true}) test_wait_times_out(worlds, while_running);
  test_close_ends_everything(worlds);
  test_closed();
}
