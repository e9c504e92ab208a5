// The handle of an asynchronous operation.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
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
  /// What is left to do in the caller's memory when the operation has succeeded. Whoever completes the Work does it
  /// first: when done() is true, every output holds its result. May take any lock of the caller's (that of Python), so
  /// that a Work which has one is completed while no lock of the core's is held.
  using Finish = std::function<void()>;

  explicit Work(std::shared_ptr<Runner> runner, Finish finish = {})
      : runner_(std::move(runner)), finish_(std::move(finish)) {}
  virtual ~Work() = default;
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

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

  /// When it began to run (a message: to move) and when it was complete, nanoseconds of steady_clock; 0 before that.
  int64_t began_ns() const noexcept { return done() ? began_ns_ : 0; }
  int64_t ended_ns() const noexcept { return done() ? ended_ns_ : 0; }

  /// Called once, by the thread that runs it.
  void begin() noexcept { began_ns_ = now_ns(); }
  void complete(std::exception_ptr error = nullptr) noexcept {
    error_ = std::move(error);
    if (finish_) {
      try {
        if (!error_) finish_();
      } catch (...) {
        error_ = std::current_exception();
      }
      finish_ = nullptr;
    }
    ended_ns_ = now_ns();
    if (began_ns_ == 0) began_ns_ = ended_ns_;
    done_.store(true, std::memory_order_release);
  }

 private:
  static int64_t now_ns() noexcept {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  std::shared_ptr<Runner> runner_;
  Finish finish_;
  std::atomic<bool> done_{false};
  std::exception_ptr error_;
  int64_t began_ns_ = 0, ended_ns_ = 0;
  int source_ = -1;
};

}  // namespace paracomm
