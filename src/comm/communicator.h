// A group of ranks: endpoints to all peers, a cache of plans, a queue of operations, and one failure for everybody.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "comm/plan_cache.h"
#include "core/error.h"
#include "core/fd.h"
#include "core/work.h"
#include "executor/device_executor.h"
#include "executor/host_executor.h"
#include "schedule/plan.h"
#include "transport/control.h"
#include "transport/listener.h"
#include "transport/memory.h"
#include "transport/tcp.h"

namespace paracomm {

struct CommOptions {
  double timeout_s = 1800;   ///< of an operation
  size_t window_bytes = 0;   ///< the most that a rank sends per tile; 0: 320 KiB on one host, 4 MiB between hosts
  size_t staging_bytes = 0;  ///< of shared memory a rank; 0: as many windows as can be under way
  int lag = 0;               ///< see Plan; 0: 1, or more where ranks share cores
  int sockets_per_peer = 0;  ///< 0: 1
  int cores = 0;             ///< 0: as many as this process may use
};

struct OptionRange {
  const char* name;
  int64_t least, most;
};
/// What each option but `timeout_s` may be, where it is not 0.
inline constexpr OptionRange kOptionRanges[] = {
    {"window_bytes", 1 << 10, 256 << 20},
    {"staging_bytes", 4 << 10, 1 << 30},
    {"lag", 1, 64},
    {"sockets_per_peer", 1, 63},
    {"cores", 1, 1 << 16},
};
inline constexpr int kMostThreads = 256;  ///< ranks of Communicator::local: memory grows with their square

/// Throws Error(invalid_argument) for an option out of its range.
void check_options(const CommOptions& options);

/// One collective as the caller asks for it.
struct Call {
  int program = -1;
  const void* input = nullptr;
  void* output = nullptr;
  DType dtype = DType::uint8;
  ReduceOp op = ReduceOp::sum;
  size_t count = 0;                   ///< elements in all where every block is alike
  std::vector<size_t> blocks;         ///< elements of each rank's block where they differ (else empty)
  std::vector<size_t> output_blocks;  ///< all_to_all with blocks that differ
  size_t largest_block = 0;           ///< all_to_all with blocks that differ: over all ranks
  double timeout_s = -1;              ///< negative: the communicator's
};

inline constexpr int kAnyPeer = -2;

/// Throws in a forked child of the process that had this fork_generation(), before it can wait for a lock that no
/// thread of it will ever give back.
void check_process(int generation);

class PointToPoint;

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  /// Collective: every rank calls it with what every rank's listener published. Throws Error(timeout, security, ...).
  static std::shared_ptr<Communicator> connect(int rank, Listener& listener, const std::vector<std::string>& blobs,
                                               const CommOptions& options, Deadline deadline);
  /// Ranks that are threads of this process.
  static std::vector<std::shared_ptr<Communicator>> local(int world_size, const CommOptions& options);
  ~Communicator();

  int rank() const noexcept { return rank_; }
  int world_size() const noexcept { return world_size_; }
  const std::vector<std::string>& hosts() const noexcept { return hosts_; }
  /// Ranks that share memory with this one, itself included, ascending.
  const std::vector<int>& local_ranks() const noexcept { return local_ranks_; }
  /// Host number of every rank, in order of first appearance.
  const std::vector<int>& host_indices() const noexcept { return host_indices_; }
  const CommOptions& options() const noexcept { return options_; }

  /// Makes a program known; `Call::program` is the number returned. Throws Error(invalid_argument) if it is not this
  /// rank's, Error(schedule) as check_ranges().
  int add_program(Program program);
  /// The program for calls up to `max_nbytes`; entries ascending.
  void set_choice(Collective collective, int root, std::vector<std::pair<size_t, int>> entries);
  /// -1: no choice was set.
  int choose(Collective collective, int root, size_t nbytes) const noexcept;

  /// Runs the collective in the caller's thread (after what is queued). Throws.
  void run(const Call& call);
  /// Queues it.
  std::shared_ptr<Work> submit(const Call& call, Work::Finish finish = {}, bool eager = true);
  /// Begins what was submitted not to be run eagerly.
  void kick();
  /// What a DeviceExecutor for this communicator is made with.
  DeviceHooks device_hooks();
  /// Once, after the executor was connected, before the first submit_device.
  void attach_device(std::shared_ptr<DeviceExecutor> device);
  /// Runs the collective on the device, after what `stream` holds so far (see DeviceExecutor::launch). Device
  /// operations count in the same row as others: ranks submit all of them in one order.
  std::shared_ptr<Work> submit_device(const Call& call, uintptr_t stream, Work::Finish finish = {});
  const std::shared_ptr<DeviceExecutor>& device() const noexcept { return device_; }

  /// Messages of one pair and tag arrive in their order.
  std::shared_ptr<Work> send(const void* data, size_t nbytes, DType dtype, int peer, double timeout_s, int tag = 0);
  /// From kAnyPeer: from whichever rank has such a message first; `Work::source` says which.
  std::shared_ptr<Work> recv(void* data, size_t nbytes, DType dtype, int peer, double timeout_s, int tag = 0,
                             Work::Finish finish = {});

  /// Gives up on every rank: all waiters, here and elsewhere, raise.
  void abort(const std::string& why);
  /// Leaves in peace. Later calls raise.
  void close();
  /// Throws what the communicator failed with, if it did.
  void check() const;

  std::string dump_plan(const Call& call);
  uint64_t bytes_sent(int peer) const;
  std::string transport(int peer) const;
  double seconds_waiting() const noexcept { return executor_->seconds_waiting(); }

  void on_event(const PeerEvent& event);

 private:
  /// This rank's last operations: an entry is written by one thread at a time, read by any.
  class History {
   public:
    void add(const Signature& signature) noexcept;
    /// The operation of that number, unless it is too old or yet to come.
    std::optional<Signature> find(uint32_t sequence) const noexcept;

   private:
    static constexpr size_t kEntries = 256, kWords = sizeof(Signature) / sizeof(uint64_t);
    std::atomic<uint64_t> words_[kEntries][kWords] = {};
  };

  friend class CollectiveQueue;
  friend class PointToPoint;
  struct LocalGroup;

  Communicator(int rank, int world_size, const CommOptions& options, std::vector<std::string> hosts);
  void start(std::vector<std::unique_ptr<Endpoint>> endpoints, std::vector<int> which,
             std::vector<std::unique_ptr<Endpoint>> p2p_endpoints);
  void size_windows(bool network, bool crowded);
  Patience patience() const;
  /// `idle`: no job is queued or running, so that plans may be dropped.
  const Plan& plan(const Call& call, const Program& program, bool idle);
  /// The program of a call. Throws if there is none, or if the communicator has failed.
  const std::shared_ptr<const Program>& check_program(const Call& call) const;
  Signature sign(const Call& call, const Program& program, Processor processor);
  Job prepare(const Call& call, bool idle);
  /// Throws where there is none and the plan needs some.
  void check_memory_of(const Call& call, const Plan& plan) const;
  DeviceJob prepare_device(const Call& call);
  /// Throws where a rank that has left, whose device memory may be gone, is to send or receive. What it sent before was
  /// received before it left.
  void check_peers_are_here(const Program& program, const Plan& plan) const;
  void check_process() const { paracomm::check_process(generation_); }
  /// "all_reduce[ring] #7 rank 3 (hostB)".
  std::string where(const Program& program, uint32_t sequence) const;
  void run_job(Job& job);
  /// Tells peers that this rank waits; who is in another operation under the same number fails.
  void tell_waiting(const Signature& signature);
  /// What to fail with if `one` waits in an operation that is not what `other` called; empty if there is no such thing.
  std::optional<Error> contradiction(int one, const Signature& waiting, int other, const History& called) const;
  /// Remembers the first failure, tells all ranks and wakes everybody here.
  void fail(const Error& error, bool tell);
  /// The data path lost a peer: waits for what the control plane says, which knows who was the first. False: nothing.
  bool learns_cause() const;
  [[noreturn]] void throw_failure(const std::string& context) const;

  int rank_, world_size_;
  CommOptions options_;
  std::vector<std::string> hosts_;
  std::vector<int> local_ranks_, host_indices_, which_;
  int generation_;

  std::vector<std::unique_ptr<Endpoint>> endpoints_, p2p_endpoints_;
  Interruption interruption_;
  std::unique_ptr<HostExecutor> executor_;
  std::shared_ptr<ControlPlane> control_;  ///< guarded by failure_mutex_ once connected
  std::shared_ptr<LocalGroup> group_;
  std::shared_ptr<class CollectiveQueue> queue_;
  std::shared_ptr<PointToPoint> p2p_;

  std::shared_ptr<DeviceExecutor> device_;

  std::vector<std::shared_ptr<const Program>> programs_;  ///< guarded by the queue's lock, as the plans are
  std::map<std::pair<int, int>, std::vector<std::pair<size_t, int>>> choices_;
  const std::vector<std::pair<size_t, int>>* all_reduce_choice_ = nullptr;
  PlanCache plans_, device_plans_;
  uint32_t sequence_ = 0;
  History history_;

  mutable std::mutex failure_mutex_;
  std::optional<Error> failure_;
  bool closed_ = false;
};

}  // namespace paracomm
