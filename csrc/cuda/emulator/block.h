// One block of a launch: its CUDA threads are fibers, which the calling OS thread runs in turn.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "execution.h"
#include "fiber.h"

namespace paracomm::emulator {

class Gpu;

/// A small generator with good bits (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  PARACOMM_EMULATOR_UNSEEN uint64_t next() {
    uint64_t bits = state_ += 0x9e3779b97f4a7c15;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111eb;
    return bits ^ (bits >> 31);
  }
  PARACOMM_EMULATOR_UNSEEN bool one_in(unsigned n) { return next() % n == 0; }

 private:
  uint64_t state_;
};

/// A kernel with its arguments.
struct Kernel {
  std::function<void()> body;
  api::dim3 grid, block;
  size_t shared_bytes = 0;

  uint64_t blocks() const { return uint64_t{grid.x} * grid.y * grid.z; }
  unsigned threads() const { return block.x * block.y * block.z; }
};

/// What the blocks of one launch share.
struct Launch {
  const Kernel& kernel;
  Gpu& gpu;
  uint64_t seed = 0;                    ///< 0: not disturbed
  std::atomic<uint64_t> next_block{0};  ///< for those who have run their first
  std::atomic<bool> failed{false};
};

enum class State : uint8_t { ready, polling, at_barrier, at_warp, done };

struct DeviceThread : Position {
  uint32_t index = 0;
  State state = State::ready;
  bool fenced = false;
  Fiber fiber;
  Exchange* exchange = nullptr;  ///< at a meeting of the warp
  int barrier_count = 0;         ///< what the last barrier counted
  Where where;                   ///< of the barrier or the meeting
  /// The last values that it read from memory that others write.
  struct Observation {
    const void* address = nullptr;
    uint64_t value = 0;
    bool again = false;  ///< it was read twice, and was the same
  };
  std::array<Observation, 8> observations;
  unsigned next_observation = 0;  ///< to be replaced
  unsigned unyielding = 0;        ///< observations since it last handed over
};

/// Meetings under way in one warp, at each of which another set of its lanes waits.
struct Warp {
  struct Meeting {
    uint32_t mask = 0, arrived = 0;
  };
  uint32_t alive = 0;
  std::array<Meeting, 32> meetings;
  unsigned under_way = 0;
};

class Block {
 public:
  Block();

  /// Runs block number `number` of the launch to its end, or until the launch fails.
  void run(Launch& launch, uint64_t number);

  // Called by the thread that runs, on its fiber.
  int sync_threads(bool predicate, Where where);
  void meet(Exchange& exchange, Where where);
  uint32_t lanes_alive() const;
  void preempt();
  void observe(const void* address, uint64_t value);
  void yield(State state);
  [[noreturn]] void trap(const char* why, Where where);
  DeviceThread& current() { return *current_; }
  void* shared() { return shared_; }

 private:
  static void enter();
  void start(uint64_t number);
  void run_rounds();
  bool run_round();
  void resume(DeviceThread& thread);
  void wait_for_others();
  bool must_stop();
  void shuffle_order();
  void end_thread();
  void check_barrier();
  bool settle(Warp& warp, unsigned meeting);
  unsigned join(Warp& warp, const Exchange& exchange);
  void check_lanes(const Warp& warp, const Exchange& exchange);
  void fail(int error, const std::string& why);
  void blame_current(const std::string& why);
  [[noreturn]] void abandon();
  std::string who_waits() const;
  static std::string waiting_for(const DeviceThread& thread);
  static std::string polled_by(const DeviceThread& thread);
  Warp& warp_of(const DeviceThread& thread) { return warps_[thread.index / 32]; }

  Launch* launch_ = nullptr;
  Geometry geometry_;
  Random random_;
  bool disturbed_ = false, failed_ = false;
  Fiber scheduler_;
  Stacks stacks_;
  unsigned count_ = 0, alive_ = 0, at_barrier_ = 0, predicates_ = 0;
  Where barrier_where_;
  DeviceThread* current_ = nullptr;
  size_t capacity_ = 0;
  std::unique_ptr<DeviceThread[]> threads_;
  std::unique_ptr<Warp[]> warps_;
  std::vector<uint32_t> order_;
  std::vector<std::byte> shared_memory_;
  std::byte* shared_ = nullptr;
  unsigned idle_rounds_ = 0;
  std::chrono::steady_clock::time_point idle_since_;
};

}  // namespace paracomm::emulator
