// A point in time by which something must have happened.
#pragma once

#include <algorithm>
#include <chrono>
#include <climits>

namespace paracomm {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  static Deadline never() noexcept { return Deadline(Clock::time_point::max()); }
  /// A negative, infinite or absurdly long time never passes.
  static Deadline after(double seconds) noexcept {
    if (!(seconds >= 0.0 && seconds < 1e9)) return never();
    return Deadline(Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
  }

  bool is_never() const noexcept { return at_ == Clock::time_point::max(); }
  bool expired() const noexcept { return !is_never() && Clock::now() >= at_; }
  /// Time left, not below zero; microseconds::max() if there is no end.
  std::chrono::microseconds remaining() const noexcept {
    if (is_never()) return std::chrono::microseconds::max();
    return std::max(std::chrono::microseconds(0),
                    std::chrono::duration_cast<std::chrono::microseconds>(at_ - Clock::now()));
  }
  /// For poll(): milliseconds left, rounded up, at most `at_most`; -1 if there is no end to either.
  int poll_ms(int at_most = INT_MAX) const noexcept {
    if (is_never()) return at_most == INT_MAX ? -1 : at_most;
    return static_cast<int>(std::min<long long>((remaining().count() + 999) / 1000, at_most));
  }

  friend bool operator==(const Deadline&, const Deadline&) = default;
  friend auto operator<=>(const Deadline&, const Deadline&) = default;

 private:
  explicit Deadline(Clock::time_point at) noexcept : at_(at) {}

  Clock::time_point at_;
};

}  // namespace paracomm
