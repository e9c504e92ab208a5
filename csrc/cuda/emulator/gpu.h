// An emulated GPU: how many blocks it holds at once, its default stream, and whether it still works.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace paracomm::emulator {

class Stream;

class Gpu {
 public:
  static constexpr int kMultiprocessors = 8;
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kThreadsPerBlock = 1024;
  static constexpr size_t kSharedBytesPerBlock = 48 << 10;

  /// PARACOMM_EMULATED_DEVICES, 8 where that is not set; -1 where it is no number from 0 to 64.
  static int count();
  /// Of 0 <= index < count().
  static Gpu& at(int index);
  static std::chrono::duration<double> patience();
  static void set_patience(double seconds);

  int index() const noexcept { return index_; }

  /// Takes room for one block, when there is some. False: the GPU failed before.
  bool occupy();
  void vacate();

  /// The first failure stays, until `reset`.
  void fail(int error, const std::string& report);
  /// 0, or the error of every call from now on.
  int error() const noexcept { return error_.load(std::memory_order_relaxed); }
  /// What `fail` was told first; "" if nothing.
  const char* report() const noexcept { return report_.load(std::memory_order_acquire); }
  void stall(bool stalled) noexcept { stalled_.store(stalled, std::memory_order_relaxed); }
  void reset();
  /// False: it was enabled before.
  bool enable_peer(int peer);
  /// To be asked by whatever runs on the GPU; does not return while it is stalled. True: leave.
  bool stopped() const;

  /// The stream with handle 0, which waits for all the blocking streams, as they do for it.
  std::shared_ptr<Stream> default_stream();
  void add(const std::shared_ptr<Stream>& stream);
  /// All that live, the default stream included if it was ever used.
  std::vector<std::shared_ptr<Stream>> streams();
  /// Waits until all that was submitted is done.
  void synchronize();

 private:
  explicit Gpu(int index) : index_(index) {}

  const int index_;
  std::atomic<int> error_{0};
  std::atomic<const char*> report_{""};
  std::deque<std::string> reports_;  ///< kept for good: callers hold their texts
  std::atomic<bool> stalled_{false};
  std::mutex mutex_;
  std::condition_variable vacated_;
  int occupied_ = 0;
  std::set<int> peers_;
  std::shared_ptr<Stream> default_stream_;
  std::vector<std::weak_ptr<Stream>> streams_;
};

}  // namespace paracomm::emulator
