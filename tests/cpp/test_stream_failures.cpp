// What goes wrong on one device is an error with a name on every rank, in time, and no kernel hangs.
#include <chrono>

#include "cuda/emulator/control.h"
#include "devices.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// What wait() throws; fails the test if it takes longer than `within` seconds, or throws nothing.
Error error_of(const std::shared_ptr<Work>& work, double within) {
  const auto start = Clock::now();
  try {
    work->wait();
  } catch (const Error& error) {
    if (seconds_since(start) > within)
      fail(__FILE__, __LINE__, "took " + std::to_string(seconds_since(start)) + " s: " + error.what());
    return error;
  }
  fail(__FILE__, __LINE__, "an operation that had to fail was complete");
}

/// What the submission or else the wait throws: a peer may have failed before this rank submits.
template <class Submit>
Error error_of_call(Submit submit, double within) {
  std::shared_ptr<Work> work;
  try {
    work = submit();
  } catch (const Error& error) {
    return error;
  }
  return error_of(work, within);
}

void check_error(const Error& error, ErrorKind kind, const std::vector<std::string>& fragments) {
  for (const std::string& fragment : fragments)
    if (std::string(error.what()).find(fragment) == std::string::npos)
      fail(__FILE__, __LINE__, "no '" + fragment + "' in: " + error.what());
  if (error.kind() != kind) fail(__FILE__, __LINE__, std::string("another kind: ") + error.what());
}

/// Ranks of one schedule with an int32 buffer each.
class Group {
 public:
  Group(const std::vector<World>& worlds, const std::string& name, int n, size_t count = 5000)
      : world_(find_world(worlds, name, n)), devices_(n), programs_(static_cast<size_t>(n)) {
    for (int r = 0; r < n; ++r) {
      programs_[static_cast<size_t>(r)] = devices_[r].add_program(world_.programs[static_cast<size_t>(r)]);
      streams_.push_back(std::make_unique<DeviceStream>(r));
      buffers_.push_back(std::make_unique<DeviceBuffer>(random_elements(DType::int32, count, 1)));
    }
  }

  Communicator& comm(int rank) { return devices_[rank]; }
  Call call(int rank, size_t count, double timeout_s = 20) const {
    Call call;
    call.program = programs_[static_cast<size_t>(rank)];
    call.dtype = DType::int32;
    call.count = count;
    call.input = call.output = buffers_[static_cast<size_t>(rank)]->data();
    call.timeout_s = timeout_s;
    return call;
  }
  std::shared_ptr<Work> submit(int rank, size_t count, double timeout_s = 20) {
    return devices_[rank].submit_device(call(rank, count, timeout_s), streams_[static_cast<size_t>(rank)]->number());
  }
  void run_once(size_t count) {
    std::vector<std::shared_ptr<Work>> works;
    for (size_t r = 0; r < programs_.size(); ++r) works.push_back(submit(static_cast<int>(r), count));
    for (const auto& work : works) work->wait();
  }

 private:
  const World& world_;
  DeviceWorld devices_;
  std::vector<int> programs_;
  std::vector<std::unique_ptr<DeviceStream>> streams_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
};

constexpr double kSoon = 3;

/// One rank does not come: the others say whom they waited for, where, and for how long.
void test_timeout(const std::vector<World>& worlds, const std::string& name, const std::string& place) {
  Group group(worlds, name, 3);
  group.run_once(1000);
  const auto one = group.submit(0, 1000, 0.3), two = group.submit(1, 1000, 0.3);
  for (const auto& work : {one, two}) {
    const Error error = error_of(work, kSoon);
    check_error(error, ErrorKind::timeout, {"#2 rank ", "(thread)", place, "timed out after 0.3 s"});
  }
  // The communicator is of no more use, on the rank that did nothing either.
  CHECK_THROWS(group.submit(2, 1000), ErrorKind::timeout, "gave up");
}

/// A rank whose call differs is named, with the difference, on all ranks.
void test_mismatch(const std::vector<World>& worlds, const std::string& name) {
  Group group(worlds, name, 3);
  group.run_once(1000);
  run_threads(3, [&](int rank) {
    const Error error = error_of_call([&] { return group.submit(rank, rank == 1 ? 1001 : 1000); }, kSoon);
    check_error(error, ErrorKind::mismatch, {"#2 rank ", "count 100", "1001"});
  });
}

/// Other schedules under one number, none of which has a message for the other.
void test_different_calls(const std::vector<World>& worlds) {
  DeviceWorld devices(2);
  const World& reduce = find_world(worlds, "reduce.binomial", 2);        // 0 sends to its root, 1
  const World& broadcast = find_world(worlds, "broadcast.binomial", 2);  // 0 receives from its root, 1
  const DeviceStream zero(0), one(1);
  const DeviceBuffer a(Bytes(400)), b(Bytes(400));
  Call call;
  call.dtype = DType::float32;
  call.count = 100;
  call.program = devices[0].add_program(broadcast.programs[0]);
  call.output = a.data();
  const auto first = devices[0].submit_device(call, zero.number());
  call.program = devices[1].add_program(reduce.programs[1]);
  call.input = call.output = b.data();
  const auto second = devices[1].submit_device(call, one.number());
  check_error(error_of(first, kSoon), ErrorKind::mismatch,
              {"broadcast", "reduce", "rank 0 (thread)", "rank 1 (thread)"});
  check_error(error_of(second, kSoon), ErrorKind::mismatch, {"broadcast", "reduce"});
}

/// One rank's tensor is on the host, the others' on devices.
void test_host_against_device(const std::vector<World>& worlds) {
  Group group(worlds, "all_reduce.ring", 2);
  std::vector<int32_t> host(1000);
  Call call = group.call(0, host.size());
  call.input = call.output = host.data();
  const auto on_host = group.comm(0).submit(call);
  const auto on_device = group.submit(1, host.size());
  check_error(error_of(on_host, kSoon), ErrorKind::mismatch, {"processor", "host", "device"});
  check_error(error_of(on_device, kSoon), ErrorKind::mismatch, {"processor", "host", "device"});
}

/// A device that makes no step: the others time out and name it.
void test_stall(const std::vector<World>& worlds, const std::string& name) {
  Group group(worlds, name, 4);
  group.run_once(5000);
  emulator::stall_device(2, true);
  std::vector<std::shared_ptr<Work>> works;
  for (int r = 0; r < 4; ++r) works.push_back(group.submit(r, 5000, 0.4));
  for (const int r : {0, 1, 3})
    check_error(error_of(works[static_cast<size_t>(r)], kSoon), ErrorKind::timeout, {"#2 rank "});
  // Its own rank learns it from the others; that its kernel does not end changes nothing.
  check_error(error_of(works[2], 2 * kSoon), ErrorKind::timeout, {"rank 2 (thread)", "gave up"});
  emulator::stall_device(2, false);
}

/// A device that fails: an error on its own rank says so, and the others hear of it.
void test_death(const std::vector<World>& worlds, const std::string& name) {
  Group group(worlds, name, 4);
  group.run_once(5000);
  emulator::fail_device(2);
  std::vector<std::shared_ptr<Work>> works;
  for (const int r : {0, 1, 3}) works.push_back(group.submit(r, 5000, 20));
  CHECK_THROWS(group.submit(2, 5000), ErrorKind::error, "#2 rank 2 (thread)");
  for (const auto& work : works)
    check_error(error_of(work, kSoon), ErrorKind::error, {"#2 rank ", "rank 2 (thread) gave up"});
}

/// The same while its kernel runs.
void test_death_in_flight(const std::vector<World>& worlds) {
  Group group(worlds, "all_reduce.ring", 4);
  std::vector<std::shared_ptr<Work>> works;
  for (const int r : {0, 2, 3}) works.push_back(group.submit(r, 5000, 20));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  emulator::fail_device(2);
  check_error(error_of(works[1], kSoon), ErrorKind::error, {"#1 rank 2 (thread)", "device 2"});
  for (const auto& work : {works[0], works[2]})
    check_error(error_of(work, kSoon), ErrorKind::error, {"#1 rank ", "rank 2 (thread) gave up"});
}

void test_abort(const std::vector<World>& worlds) {
  Group group(worlds, "all_reduce.ring", 2);
  const auto work = group.submit(0, 5000);
  group.comm(1).abort("enough");
  check_error(error_of(work, kSoon), ErrorKind::error, {"all_reduce[ring] #1 rank 0 (thread)", "enough"});
}

/// wait() with a time of its own.
void test_wait_times_out(const std::vector<World>& worlds) {
  Group group(worlds, "all_reduce.ring", 2);
  const auto work = group.submit(0, 5000);
  CHECK_THROWS(work->wait(0.1), ErrorKind::timeout, "not complete 0.1");
  CHECK_THROWS(group.submit(1, 5000), ErrorKind::timeout, "rank 0 (thread) gave up");
}

void test_close(const std::vector<World>& worlds) {
  Group group(worlds, "all_reduce.ring", 2);
  group.run_once(5000);
  group.comm(0).close();
  CHECK_THROWS(group.submit(0, 5000), ErrorKind::error, "closed");
  CHECK_THROWS(group.submit(1, 5000), ErrorKind::peer_lost, "rank 0 (thread) has closed its communicator");
}

/// What was complete before a failure stays complete.
void test_earlier_calls_stay_complete(const std::vector<World>& worlds) {
  Group group(worlds, "all_reduce.ring", 2);
  std::vector<std::shared_ptr<Work>> good;
  for (int r = 0; r < 2; ++r) good.push_back(group.submit(r, 5000));
  const auto bad = group.submit(0, 5000, 0.2);
  check_error(error_of(bad, kSoon), ErrorKind::timeout, {"#2 rank 0"});
  for (const auto& work : good) work->wait();
}

void test_options() {
  const Comms comms = Communicator::local(2, small_windows());
  DeviceOptions other = small_device();
  other.channels = 3;
  const auto a = emulated::make_device_executor(0, small_device(), comms[0]->device_hooks());
  const auto b = emulated::make_device_executor(1, other, comms[1]->device_hooks());
  const std::vector<std::string> cards{a->publish(), b->publish()};
  CHECK_THROWS(a->connect(cards), ErrorKind::mismatch, "channels is 2 here, 3 on rank 1 (thread)");
  CHECK_THROWS(a->connect({cards[0], "hello"}), ErrorKind::mismatch, "no card");
  CHECK_THROWS(a->connect({cards[0]}), ErrorKind::invalid_argument, "1 device cards for 2 ranks");
  CHECK_THROWS(emulated::make_device_executor(99, small_device(), comms[0]->device_hooks()),
               ErrorKind::invalid_argument, "no emulated device 99");
  other.threads = 4096;
  CHECK_THROWS(emulated::make_device_executor(0, other, comms[0]->device_hooks()), ErrorKind::invalid_argument,
               "threads");
  DeviceHooks elsewhere = comms[0]->device_hooks();
  elsewhere.host_indices = {0, 1};
  const auto c = emulated::make_device_executor(0, small_device(), elsewhere);
  CHECK_THROWS(c->connect(cards), ErrorKind::invalid_argument, "rank 1 (thread) is on another host");
  Call call;
  CHECK_THROWS(comms[0]->submit_device(call, 0), ErrorKind::error, "no device");
}

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  test_options();
  test_timeout(worlds, "all_reduce.ring", "recv from rank");
  test_timeout(worlds, "all_reduce.ordered", "wait for rank");
  for (const char* name : {"all_reduce.ring", "all_reduce.ordered", "all_reduce.one_shot"}) {
    test_mismatch(worlds, name);
    test_stall(worlds, name);
    test_death(worlds, name);
    emulator::reset_device(2);
  }
  test_death_in_flight(worlds);
  emulator::reset_device(2);
  test_different_calls(worlds);
  test_host_against_device(worlds);
  test_abort(worlds);
  test_wait_times_out(worlds);
  test_close(worlds);
  test_earlier_calls_stay_complete(worlds);
}
