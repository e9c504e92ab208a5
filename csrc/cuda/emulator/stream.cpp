#include "stream.h"

#include <thread>
#include <utility>

namespace paracomm::emulator {

void Stream::submit(Operation operation) {
  std::vector<Ticket> before = implicit_dependencies();
  const std::lock_guard lock(mutex_);
  if (capture_.capture != nullptr) {
    capture_.nodes = {capture_.capture->add(std::move(operation), capture_.nodes)};
    return;
  }
  if (!before.empty())
    operation = [before = std::move(before), operation = std::move(operation)](Crew& crew) {
      for (const Ticket& ticket : before) ticket.stream->wait(ticket.number);
      operation(crew);
    };
  queue_.push_back(std::move(operation));
  ++submitted_;
  if (!std::exchange(working_, true)) std::thread([self = shared_from_this()] { self->work(); }).detach();
  changed_.notify_all();
}

std::vector<Stream::Ticket> Stream::implicit_dependencies() {
  std::vector<Ticket> tickets;
  if (kind_ == Kind::independent) return tickets;
  for (std::shared_ptr<Stream>& stream : gpu_.streams()) {
    const bool other = stream.get() != this && stream->kind() != Kind::independent;
    if (!other || (kind_ != Kind::legacy && stream->kind() != Kind::legacy)) continue;
    const uint64_t number = stream->submitted();
    if (!stream->reached(number)) tickets.push_back({std::move(stream), number});
  }
  return tickets;
}

uint64_t Stream::submitted() const {
  const std::lock_guard lock(mutex_);
  return submitted_;
}

bool Stream::reached(uint64_t number) const {
  const std::lock_guard lock(mutex_);
  return done_ >= number;
}

void Stream::wait(uint64_t number) const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_ >= number; });
}

void Stream::close() {
  const std::lock_guard lock(mutex_);
  closing_ = true;
  changed_.notify_all();
}

void Stream::work() {
  Crew crew(gpu_);
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return closing_ || !queue_.empty(); });
    if (queue_.empty()) return;
    {
      const Operation operation = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (!gpu_.stopped()) operation(crew);
      // What the operation held is let go before anybody is told that it is done.
    }
    lock.lock();
    ++done_;
    changed_.notify_all();
  }
}

bool Stream::begin_capture(const std::shared_ptr<Capture>& capture) {
  const std::lock_guard lock(mutex_);
  if (capture_.capture != nullptr) return false;
  capture_ = {capture, {}};
  return true;
}

void Stream::end_capture() {
  const std::lock_guard lock(mutex_);
  capture_ = {};
}

CapturePoint Stream::capture_point() const {
  const std::lock_guard lock(mutex_);
  return capture_;
}

bool Stream::join(const CapturePoint& point) {
  const std::lock_guard lock(mutex_);
  if (capture_.capture == nullptr) {
    capture_ = point;
    point.capture->add(shared_from_this());
    return true;
  }
  if (capture_.capture != point.capture) return false;
  capture_.nodes.insert(capture_.nodes.end(), point.nodes.begin(), point.nodes.end());
  return true;
}

}  // namespace paracomm::emulator
