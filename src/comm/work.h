// The handle of an asynchronous operation.
#pragma once

#include <atomic>
#include <exception>
#include <memory>

namespace paracomm {

class Work;

/// Whoever runs the operation.
class Runner {
 public:
  virtual ~Runner() = default;
  /// Returns when `work` is finished; runs it in this thread if nobody has started. Gives up (and stops the operation
  /// on every rank, because it uses the caller's memory) after `timeout_s` (negative: the operation's own timeout
  /// decides).
  virtual void finish(Work& work, double timeout_s) = 0;
};

class Work {
 public:
  explicit Work(std::shared_ptr<Runner> runner) : runner_(std::move(runner)) {}

  /// Blocks until the operation is complete; throws what it failed with, on every call.
  void wait(double timeout_s = -1) {
    if (!done()) runner_->finish(*this, timeout_s);
    if (error_) std::rethrow_exception(error_);
  }
  /// True when complete or failed; never blocks.
  bool done() const noexcept { return done_.load(std::memory_order_acquire); }
  /// Null while running or when it succeeded.
  std::exception_ptr error() const noexcept { return done() ? error_ : nullptr; }

  /// The rank that a receive got its message from, -1 before that and for anything else.
  int source() const noexcept { return done() ? source_ : -1; }
  void set_source(int rank) noexcept { source_ = rank; }

  void complete(std::exception_ptr error = nullptr) noexcept {
    error_ = std::move(error);
    done_.store(true, std::memory_order_release);
  }

 private:
  std::shared_ptr<Runner> runner_;
  std::atomic<bool> done_{false};
  std::exception_ptr error_;
  int source_ = -1;
};

}  // namespace paracomm
