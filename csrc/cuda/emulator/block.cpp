#include "block.h"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "gpu.h"
#include "memory.h"
#include "runtime_api.h"

namespace paracomm::emulator {
namespace {

constexpr int kPreemptOneIn = 4;        // disturbed: at one of so many chances a thread hands over
constexpr int kHandCoreOneIn = 16;      // disturbed: after one of so many turns the whole block does
constexpr unsigned kEagerRounds = 200;  // of polling, with no more than sched_yield between
constexpr long kNapNs = 50'000;         // between later rounds: the cores are needed by those who are waited for
constexpr unsigned kYieldAfter = 64;    // observations: a thread that polls very many places hands over as well
constexpr std::byte kGarbage{0xcb};

constinit thread_local Block* running = nullptr;

std::string at(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same(Where a, Where b) { return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0; }

std::string hex(uint64_t bits) {
  char text[24];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(bits));
  return text;
}

}  // namespace

constinit thread_local const Position* position = nullptr;

Block::Block() = default;

// --- the turn of each thread ---

void Block::run(Launch& launch, uint64_t number) {
  launch_ = &launch;
  start(number);
  happens_before(&geometry_);
  running = this;
  run_rounds();
  for (unsigned i = 0; i < count_; ++i)
    if (threads_[i].state != State::done) threads_[i].fiber.forsake(scheduler_, this);
  running = nullptr;
  position = nullptr;
  happens_after(this);
}

void Block::start(uint64_t number) {
  const Kernel& kernel = launch_->kernel;
  count_ = alive_ = kernel.threads();
  at_barrier_ = predicates_ = idle_rounds_ = 0;
  failed_ = false;
  disturbed_ = launch_->seed != 0;
  random_ = Random(launch_->seed + number);
  const auto x = static_cast<unsigned>(number % kernel.grid.x);
  const auto y = static_cast<unsigned>(number / kernel.grid.x % kernel.grid.y);
  const auto z = static_cast<unsigned>(number / kernel.grid.x / kernel.grid.y);
  geometry_ = {{x, y, z}, kernel.block, kernel.grid};

  if (count_ > capacity_) {
    threads_ = std::make_unique<DeviceThread[]>(count_);
    warps_ = std::make_unique<Warp[]>((count_ + 31) / 32);
    capacity_ = count_;
    stacks_.reserve(count_);
  }
  std::fill_n(warps_.get(), (count_ + 31) / 32, Warp{});
  order_.resize(count_);
  shared_memory_.assign(kernel.shared_bytes + 128, kGarbage);
  shared_ = shared_memory_.data() + (128 - reinterpret_cast<uintptr_t>(shared_memory_.data()) % 128);
  scheduler_.adopt_thread();
  for (unsigned i = 0; i < count_; ++i) {
    DeviceThread& thread = threads_[i];
    const api::dim3& dim = kernel.block;
    thread.thread = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    thread.lane = i % 32;
    thread.geometry = &geometry_;
    thread.index = order_[i] = i;
    thread.state = State::ready;
    thread.fenced = false;
    thread.observations = {};
    thread.next_observation = thread.unyielding = 0;
    warp_of(thread).alive |= 1u << thread.lane;
    thread.fiber.prepare(stacks_.stack(i), &Block::enter);
  }
}

PARACOMM_EMULATOR_UNSEEN void Block::enter() {
  Block& block = *running;
  block.current_->fiber.entered();
  happens_after(&block.geometry_);
  block.launch_->kernel.body();
  block.end_thread();
  std::abort();  // not reached: nobody resumes a thread that is done
}

PARACOMM_EMULATOR_UNSEEN void Block::end_thread() {
  DeviceThread& thread = *current_;
  --alive_;
  Warp& warp = warp_of(thread);
  warp.alive &= ~(1u << thread.lane);
  // Those who wait for all that are left may now be complete.
  for (unsigned i = warp.under_way; i-- > 0;) settle(warp, i);
  check_barrier();
  thread.state = State::done;
  happens_before(this);
  thread.fiber.switch_to(scheduler_);
}

PARACOMM_EMULATOR_UNSEEN void Block::run_rounds() {
  while (alive_ > 0 && !must_stop()) {
    if (disturbed_) shuffle_order();
    if (run_round())
      idle_rounds_ = 0;
    else
      wait_for_others();
  }
}

/// One turn for each thread that can go on. False: they only polled.
PARACOMM_EMULATOR_UNSEEN bool Block::run_round() {
  bool progress = false;
  for (unsigned i = 0; i < count_ && !failed_; ++i) {
    DeviceThread& thread = threads_[order_[i]];
    if (thread.state != State::ready && thread.state != State::polling) continue;
    resume(thread);
    progress |= thread.state != State::polling;
  }
  return progress;
}

PARACOMM_EMULATOR_UNSEEN void Block::resume(DeviceThread& thread) {
  thread.state = State::ready;
  current_ = &thread;
  position = &thread;
  scheduler_.switch_to(thread.fiber);
  if (!thread.fiber.stack_is_sound())
    fail(api::cudaErrorIllegalAddress, "thread " + std::to_string(thread.index) + " overflowed its stack of " +
                                           std::to_string(Stacks::kBytes) + " bytes");
  if (disturbed_ && random_.one_in(kHandCoreOneIn)) ::sched_yield();
}

PARACOMM_EMULATOR_UNSEEN void Block::yield(State state) {
  DeviceThread& thread = *current_;
  thread.state = state;
  thread.fiber.switch_to(scheduler_);
}

PARACOMM_EMULATOR_UNSEEN bool Block::must_stop() {
  if (failed_ || launch_->failed.load(std::memory_order_relaxed)) return true;
  return launch_->gpu.stopped();
}

/// No thread can go on by itself: let other blocks and the host run. If nobody polls, nobody ever will go on.
void Block::wait_for_others() {
  bool polling = false;
  for (unsigned i = 0; i < count_; ++i) polling |= threads_[i].state == State::polling;
  if (!polling) return fail(api::cudaErrorLaunchFailure, "deadlock: " + who_waits());
  const auto now = std::chrono::steady_clock::now();
  if (idle_rounds_++ == 0) idle_since_ = now;
  if (now - idle_since_ > Gpu::patience()) return fail(api::cudaErrorLaunchTimeout, "stuck: " + who_waits());
  if (idle_rounds_ < kEagerRounds) {
    ::sched_yield();
  } else {
    const timespec nap{0, kNapNs};
    ::nanosleep(&nap, nullptr);
  }
}

void Block::shuffle_order() {
  for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random_.next() % i]);
}

// --- barriers of the block ---

PARACOMM_EMULATOR_UNSEEN int Block::sync_threads(bool predicate, Where where) {
  preempt();
  DeviceThread& thread = *current_;
  thread.where = where;
  if (at_barrier_ > 0 && !same(where, barrier_where_)) {
    blame_current("__syncthreads() here, while other threads of the block wait at that of " + at(barrier_where_));
    abandon();
  }
  barrier_where_ = where;
  predicates_ += predicate;
  ++at_barrier_;
  thread.fenced = false;
  happens_before(&at_barrier_);
  thread.state = State::at_barrier;
  check_barrier();
  if (thread.state == State::at_barrier) yield(State::at_barrier);
  happens_after(&at_barrier_);
  return thread.barrier_count;
}

PARACOMM_EMULATOR_UNSEEN void Block::check_barrier() {
  if (at_barrier_ == 0 || at_barrier_ < alive_) return;
  for (unsigned i = 0; i < count_; ++i) {
    if (threads_[i].state != State::at_barrier) continue;
    threads_[i].barrier_count = static_cast<int>(predicates_);
    threads_[i].state = State::ready;
  }
  at_barrier_ = predicates_ = 0;
}

// --- meetings of a warp ---

PARACOMM_EMULATOR_UNSEEN void Block::meet(Exchange& exchange, Where where) {
  preempt();
  DeviceThread& thread = *current_;
  Warp& warp = warp_of(thread);
  const bool orders = exchange.call == WarpCall::sync;
  thread.where = where;
  check_lanes(warp, exchange);
  const unsigned meeting = join(warp, exchange);
  thread.exchange = &exchange;
  thread.state = State::at_warp;
  if (orders) {
    thread.fenced = false;
    happens_before(&warp);
  }
  if (!settle(warp, meeting)) yield(State::at_warp);
  if (orders) happens_after(&warp);
}

/// Ends the launch where CUDA leaves undefined what happens.
PARACOMM_EMULATOR_UNSEEN void Block::check_lanes(const Warp& warp, const Exchange& exchange) {
  const DeviceThread& thread = *current_;
  if ((exchange.mask >> thread.lane & 1) == 0) {
    blame_current("it is not in its own mask " + hex(exchange.mask));
    abandon();
  }
  if (exchange.call == WarpCall::shuffle && (exchange.mask & warp.alive & 1u << exchange.source) == 0) {
    blame_current("it wants the value of lane " + std::to_string(exchange.source) + ", which does not take part");
    abandon();
  }
  for (unsigned i = 0; i < warp.under_way; ++i) {
    const Warp::Meeting& meeting = warp.meetings[i];
    if (meeting.mask != exchange.mask) continue;  // lanes of it may be on their way
    const uint32_t other = (thread.index & ~31u) + static_cast<uint32_t>(std::countr_zero(meeting.arrived));
    if (threads_[other].exchange->call == exchange.call) continue;
    blame_current("it calls another warp function than thread " + std::to_string(other) + " at " +
                  at(threads_[other].where));
    abandon();
  }
}

/// The meeting that has this mask, with the current lane in it.
PARACOMM_EMULATOR_UNSEEN unsigned Block::join(Warp& warp, const Exchange& exchange) {
  unsigned i = 0;
  while (i < warp.under_way && warp.meetings[i].mask != exchange.mask) ++i;
  if (i == warp.under_way) warp.meetings[warp.under_way++] = {exchange.mask, 0};
  warp.meetings[i].arrived |= 1u << current_->lane;
  return i;
}

/// Ends the meeting if all its lanes are there.
PARACOMM_EMULATOR_UNSEEN bool Block::settle(Warp& warp, unsigned meeting) {
  const auto [mask, arrived] = warp.meetings[meeting];
  if (arrived != (mask & warp.alive)) return false;
  DeviceThread* lanes = &threads_[static_cast<size_t>(&warp - warps_.get()) * 32];
  uint32_t ballot = 0;
  for (uint32_t i = 0; i < 32; ++i)
    if ((arrived >> i & 1) != 0 && lanes[i].exchange->predicate) ballot |= 1u << i;
  for (uint32_t i = 0; i < 32; ++i) {
    if ((arrived >> i & 1) == 0) continue;
    Exchange& exchange = *lanes[i].exchange;
    exchange.ballot = ballot;
    if (exchange.call == WarpCall::shuffle) exchange.received = lanes[exchange.source].exchange->value;
    lanes[i].state = State::ready;
  }
  warp.meetings[meeting] = warp.meetings[--warp.under_way];
  return true;
}

PARACOMM_EMULATOR_UNSEEN uint32_t Block::lanes_alive() const { return warps_[current_->index / 32].alive; }

// --- flags ---

PARACOMM_EMULATOR_UNSEEN void Block::preempt() {
  if (disturbed_ && random_.one_in(kPreemptOneIn)) yield(State::ready);
}

PARACOMM_EMULATOR_UNSEEN void Block::observe(const void* address, uint64_t value) {
  DeviceThread& thread = *current_;
  auto* const end = thread.observations.data() + thread.observations.size();
  auto* known = thread.observations.data();
  while (known != end && known->address != address) ++known;
  if (known == end) {
    known = &thread.observations[thread.next_observation++ % thread.observations.size()];
    *known = {address, value, false};
  } else {
    known->again = known->value == value;
    known->value = value;
  }
  if (known->again)
    yield(State::polling);
  else if (++thread.unyielding % kYieldAfter == 0)
    yield(State::ready);
  else
    preempt();
}

// --- what goes wrong ---

PARACOMM_EMULATOR_UNSEEN void Block::fail(int error, const std::string& why) {
  failed_ = true;
  launch_->failed.store(true, std::memory_order_relaxed);
  const api::uint3& block = geometry_.block;
  launch_->gpu.fail(error, "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                               std::to_string(block.z) + "): " + why);
}

void Block::blame_current(const std::string& why) {
  fail(api::cudaErrorLaunchFailure,
       "thread " + std::to_string(current_->index) + " at " + at(current_->where) + ": " + why);
}

/// Leaves a failed block. The frames of its threads are forgotten: they must own nothing.
PARACOMM_EMULATOR_UNSEEN void Block::abandon() {
  current_->fiber.switch_to(scheduler_);
  std::abort();  // not reached
}

void Block::trap(const char* why, Where where) {
  current_->where = where;
  blame_current(why);
  abandon();
}

/// "threads 0-3 poll ..., threads 4-255 wait at __syncthreads() of ring.cuh:88".
std::string Block::who_waits() const {
  std::string text;
  for (unsigned first = 0; first < count_;) {
    const std::string what = waiting_for(threads_[first]);
    unsigned end = first + 1;
    while (end < count_ && waiting_for(threads_[end]) == what) ++end;
    if (!text.empty()) text += "; ";
    text += end == first + 1 ? "thread " + std::to_string(first)
                             : "threads " + std::to_string(first) + "-" + std::to_string(end - 1);
    text += ": " + what;
    first = end;
  }
  return text;
}

PARACOMM_EMULATOR_UNSEEN std::string Block::waiting_for(const DeviceThread& thread) {
  switch (thread.state) {
    case State::ready:
      return "can run";
    case State::polling:
      return "polling" + polled_by(thread);
    case State::at_barrier:
      return "at __syncthreads() of " + at(thread.where);
    case State::at_warp:
      return "at a warp's meeting of " + at(thread.where) + " with mask " + hex(thread.exchange->mask);
    case State::done:
      return "ended";
  }
  return {};
}

/// " GPU 2 + 0x40, which stays 0x7, and ...".
PARACOMM_EMULATOR_UNSEEN std::string Block::polled_by(const DeviceThread& thread) {
  std::string text;
  for (const DeviceThread::Observation& observation : thread.observations) {
    if (!observation.again) continue;
    text += (text.empty() ? " " : " and ") + Memories::describe(observation.address) + ", which stays " +
            hex(observation.value);
  }
  return text.empty() ? " the clock" : text;
}

// --- execution.h ---

namespace {
PARACOMM_EMULATOR_UNSEEN Block& block() { return *running; }
}  // namespace

PARACOMM_EMULATOR_UNSEEN int sync_threads(bool predicate, Where where) {
  return block().sync_threads(predicate, where);
}
PARACOMM_EMULATOR_UNSEEN void meet(Exchange& exchange, Where where) { block().meet(exchange, where); }
PARACOMM_EMULATOR_UNSEEN uint32_t lanes_alive() { return block().lanes_alive(); }
PARACOMM_EMULATOR_UNSEEN void preempt() { block().preempt(); }
PARACOMM_EMULATOR_UNSEEN void observed(const void* address, uint64_t value) { block().observe(address, value); }
PARACOMM_EMULATOR_UNSEEN void yield() { block().yield(State::polling); }
PARACOMM_EMULATOR_UNSEEN void fence() {
  DeviceThread& thread = block().current();
  // A sanitizer cannot see fences. The last values that were read count as acquired here, and until the next barrier
  // every relaxed store as a release.
  for (const DeviceThread::Observation& observation : thread.observations)
    if (observation.address != nullptr) happens_after(observation.address);
  thread.fenced = true;
#if PARACOMM_EMULATOR_TSAN
  std::atomic_signal_fence(std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
  block().preempt();
}
PARACOMM_EMULATOR_UNSEEN bool fenced() { return block().current().fenced; }
PARACOMM_EMULATOR_UNSEEN void trap(const char* why, Where where) { block().trap(why, where); }
PARACOMM_EMULATOR_UNSEEN void* dynamic_shared() { return block().shared(); }

uint64_t globaltimer() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace paracomm::emulator
