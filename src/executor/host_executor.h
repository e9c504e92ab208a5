// Runs plans on the processor, over whatever transports reach the peers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "core/deadline.h"
#include "reduce/reduce.h"
#include "schedule/plan.h"
#include "transport/transport.h"

namespace paracomm {

/// How long to wait in which way before asking the system to sleep.
struct Patience {
  int spins = 100;   ///< looks with a pause between (some 10 ns each), at first
  int looks = 6000;  ///< looks in all
  int yield_every =
      40;  ///< after the first, one look in so many hands the core on, for the peer may be queued behind us
};

/// One collective, ready to run.
struct Job {
  const Plan* plan = nullptr;
  const Program* program = nullptr;
  Signature signature;
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  ReduceFn reduce = nullptr;
  int divisor = 1;  ///< avg: of the final value
  double timeout_s = 0;
  Deadline deadline = Deadline::never();
};

/// What other threads tell the one that runs: why to stop, and who has left.
struct Interruption {
  std::atomic<bool> stop{false};
  std::unique_ptr<std::atomic<bool>[]> left;  ///< by rank
  /// The data of `peer` have come to an end: whether that is because it left. The word comes on another connection, a
  /// moment later at times; waits for it.
  bool has_left(int peer) const;
  /// Called now and then by an operation that waits long: the others may be running another one.
  std::function<void(const Signature&)> stuck;
};

/// Thrown out of `run` when `Interruption::stop` was set.
struct Interrupted {};

class HostExecutor {
 public:
  /// `endpoints[r]` reaches rank r (null for this rank).
  HostExecutor(int rank, std::vector<Endpoint*> endpoints, std::vector<std::string> hosts, Patience patience,
               const Interruption& interruption);
  ~HostExecutor();

  /// Throws Error (timeout, mismatch, peer_lost) naming operation, rank, host and place; Interrupted.
  void run(const Job& job);

  /// Seconds that `run` spent waiting for peers, since the start; waits of a few microseconds are not counted.
  double seconds_waiting() const noexcept {
    return static_cast<double>(waited_ns_.load(std::memory_order_relaxed)) * 1e-9;
  }

 private:
  template <class Attempt>
  std::invoke_result_t<Attempt&> until(const Job& job, const Instruction& instruction, const char* what, int peer,
                                       Attempt attempt);
  template <class Attempt>
  std::invoke_result_t<Attempt&> wait_until(const Job& job, const Instruction& instruction, const char* what, int peer,
                                            Attempt attempt);
  void execute(const Job& job, const Instruction& instruction, int32_t tile);
  void write_streaming(const Job& job, const Instruction& instruction, std::byte* reserved, size_t nbytes);
  void drain(const Job& job);
  std::byte* address(const Job& job, const Place& place, int32_t size_chunk, int32_t tile) const;
  std::byte* inbox(size_t index, size_t nbytes);
  std::byte* outbox(const Job& job, const Instruction& instruction, const Destination& to, int32_t tile, size_t nbytes);
  uint64_t& record(const Job& job, const Destination& to, int32_t tile);
  void grow_scratch(size_t nbytes);
  std::string where(const Job& job, const Instruction& instruction) const;

  int rank_;
  std::vector<Endpoint*> endpoints_;
  std::vector<Endpoint*> distinct_;
  std::vector<std::string> hosts_;
  Patience patience_;
  const Interruption& interruption_;
  std::byte* scratch_ = nullptr;
  size_t scratch_bytes_ = 0;
  std::vector<std::vector<std::byte>> inboxes_;
  std::vector<std::vector<std::byte>> outboxes_;
  std::vector<uint64_t> records_;
  std::vector<uint64_t> by_reference_;  ///< by rank: one past the last message that needs the caller's memory
  std::vector<void*> dsts_;
  std::vector<const void*> srcs_;
  struct Payload {
    const std::byte* data;
    bool by_reference;
  };
  std::vector<Payload> payloads_;
  std::atomic<uint64_t> waited_ns_{0};
};

}  // namespace paracomm
