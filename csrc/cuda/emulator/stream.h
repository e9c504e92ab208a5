// A stream: a queue of operations, and the thread that does one after the other.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "crew.h"
#include "graph.h"

namespace paracomm::emulator {

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  /// Blocking streams and the legacy one wait for each other.
  enum class Kind : uint8_t { legacy, blocking, independent };

  Stream(Gpu& gpu, Kind kind, int priority) : gpu_(gpu), kind_(kind), priority_(priority) {}

  Gpu& gpu() const noexcept { return gpu_; }
  Kind kind() const noexcept { return kind_; }
  int priority() const noexcept { return priority_; }

  /// Appends to the queue, or to the graph that is being captured.
  void submit(Operation operation);
  /// Number of the last operation that was submitted; 0: none yet.
  uint64_t submitted() const;
  bool reached(uint64_t number) const;
  void wait(uint64_t number) const;
  /// Ends the thread after what was submitted.
  void close();

  // --- capture ---
  /// False: one is under way.
  bool begin_capture(const std::shared_ptr<Capture>& capture);
  void end_capture();
  /// The capture that this stream takes part in (null: none) and the last nodes that it added to it.
  CapturePoint capture_point() const;
  /// What comes from now on follows on `point`. False: the stream takes part in another capture.
  bool join(const CapturePoint& point);

 private:
  struct Ticket {
    std::shared_ptr<Stream> stream;
    uint64_t number;
  };
  std::vector<Ticket> implicit_dependencies();
  void work();

  Gpu& gpu_;
  const Kind kind_;
  const int priority_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::deque<Operation> queue_;
  uint64_t submitted_ = 0, done_ = 0;
  bool working_ = false, closing_ = false;
  CapturePoint capture_;
};

}  // namespace paracomm::emulator
