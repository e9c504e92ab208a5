// Operations of one communicator in their order: run by the thread that waits for them or, if nobody does, by a
// progress thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "comm/communicator.h"

namespace paracomm {

class CollectiveQueue final : public Runner, public std::enable_shared_from_this<CollectiveQueue> {
 public:
  explicit CollectiveQueue(Communicator& comm) : comm_(comm) {}
  ~CollectiveQueue() override { stop(); }

  /// What operations are prepared under. Not held while one runs.
  std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }
  /// In this thread, at once if nothing is queued.
  void run(const Call& call);
  /// `eager`: the progress thread runs it if nobody waits; else only after kick().
  std::shared_ptr<Work> submit(const Call& call, Work::Finish finish = {}, bool eager = true);
  /// Wakes the progress thread.
  void kick();
  /// Takes its number here like the others, but runs on a stream.
  std::shared_ptr<Work> submit_device(const Call& call, uintptr_t stream, Work::Finish finish = {});
  void finish(Work& work, double timeout_s) override;
  /// Fails what is queued, waits for what runs and ends the progress thread.
  void stop() noexcept;

 private:
  struct Item {
    Job job;
    std::shared_ptr<Work> work;
  };
  /// Returns what is to be thrown in this thread alone: its signal handler raised.
  std::exception_ptr run_front(std::unique_lock<std::mutex>& lock);
  void wake();
  void serve();

  Communicator& comm_;
  const int generation_ = fork_generation();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> items_;
  bool running_ = false, stopping_ = false;
  int waiters_ = 0;
  int failing_ = 0;  ///< waits that have timed out and still tell the communicator
  std::thread thread_;
};

}  // namespace paracomm
