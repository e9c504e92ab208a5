#include "comm/queue.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/finally.h"
#include "core/nap.h"

namespace paracomm {
namespace {

constexpr std::chrono::microseconds kNap{100'000};

void relock_after_nap(std::unique_lock<std::mutex>& lock) {
  try {
    between_naps();
  } catch (...) {
    lock.lock();
    throw;
  }
  lock.lock();
}

}  // namespace

void CollectiveQueue::run(const Call& call) {
  std::unique_lock lock(mutex_);
  if (running_ || !items_.empty()) {
    lock.unlock();
    submit(call)->wait();
    return;
  }
  Job job = comm_.prepare(call, true);
  running_ = true;
  lock.unlock();
  std::exception_ptr error;
  try {
    comm_.run_job(job);
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  running_ = false;
  const bool notify = waiters_ > 0;
  lock.unlock();
  if (notify) changed_.notify_all();
  if (error) std::rethrow_exception(error);
}

std::shared_ptr<Work> CollectiveQueue::submit(const Call& call, Work::Finish finish, bool eager) {
  auto work = std::make_shared<Work>(shared_from_this(), std::move(finish));
  const std::lock_guard lock(mutex_);
  if (stopping_) throw Error(ErrorKind::error, "this communicator is closed");
  items_.push_back({comm_.prepare(call, !running_ && items_.empty()), work});
  if (eager) wake();
  return work;
}

void CollectiveQueue::kick() {
  const std::lock_guard lock(mutex_);
  if (!stopping_ && !items_.empty()) wake();
}

void CollectiveQueue::wake() {
  if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
  changed_.notify_all();
}

std::shared_ptr<Work> CollectiveQueue::submit_device(const Call& call, uintptr_t stream, Work::Finish finish) {
  const std::lock_guard lock(mutex_);
  if (stopping_) throw Error(ErrorKind::error, "this communicator is closed");
  const DeviceJob job = comm_.prepare_device(call);
  comm_.history_.add(job.signature);
  return comm_.device_->launch(job, stream, std::move(finish));
}

std::exception_ptr CollectiveQueue::run_front(std::unique_lock<std::mutex>& lock) {
  Item item = std::move(items_.front());
  items_.pop_front();
  running_ = true;
  lock.unlock();
  item.work->begin();
  std::exception_ptr error, raised;
  try {
    comm_.run_job(item.job);
  } catch (const Error&) {
    error = std::current_exception();
  } catch (const std::exception& other) {
    // What a signal handler raised may be thrown once, in its thread. The Work tells of it as often as it is asked.
    raised = std::current_exception();
    error = std::make_exception_ptr(
        Error(ErrorKind::error, comm_.where(*item.job.program, item.job.signature.sequence) + ": " + other.what()));
  }
  item.work->complete(error);
  lock.lock();
  running_ = false;
  changed_.notify_all();
  return raised;
}

void CollectiveQueue::finish(Work& work, double timeout_s) {
  check_process(generation_);  // the communicator may be gone, if this work is done by now
  const Deadline deadline = Deadline::after(timeout_s);
  std::unique_lock lock(mutex_);
  ++waiters_;
  const Finally leave{[this] { --waiters_; }};
  while (!work.done()) {
    if (!running_ && !items_.empty()) {
      Job& job = items_.front().job;
      if (deadline < job.deadline) {
        job.deadline = deadline;
        job.timeout_s = timeout_s;
      }
      if (const std::exception_ptr raised = run_front(lock)) std::rethrow_exception(raised);
      continue;
    }
    changed_.wait_for(lock, std::min<std::chrono::microseconds>(deadline.remaining(), kNap));
    if (work.done()) break;
    const bool expired = deadline.expired();
    failing_ += expired;
    lock.unlock();
    if (expired) {
      const Finally told{[this] {
        const std::lock_guard again(mutex_);
        --failing_;
        changed_.notify_all();
      }};
      comm_.fail(Error(ErrorKind::timeout, "rank " + std::to_string(comm_.rank()) +
                                               ": an asynchronous operation was not complete " +
                                               std::to_string(timeout_s) + " s after wait() was called"),
                 true);
    }
    relock_after_nap(lock);
  }
}

void CollectiveQueue::serve() {
  std::unique_lock lock(mutex_);
  ++waiters_;
  while (!stopping_) {
    if (!running_ && !items_.empty())
      run_front(lock);  // no signal is looked for in this thread
    else
      changed_.wait(lock);
  }
}

void CollectiveQueue::stop() noexcept {
  std::unique_lock lock(mutex_);
  stopping_ = true;
  ++waiters_;
  const std::deque<Item> dropped = std::exchange(items_, {});
  lock.unlock();
  for (const Item& item : dropped)
    item.work->complete(
        std::make_exception_ptr(Error(ErrorKind::error, "the communicator was closed before this operation ran")));
  lock.lock();
  changed_.notify_all();
  changed_.wait(lock, [&] { return !running_ && failing_ == 0; });
  lock.unlock();
  if (thread_.joinable()) thread_.join();
}

}  // namespace paracomm
