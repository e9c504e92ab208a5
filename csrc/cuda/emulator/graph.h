// Graphs: operations that were captured from streams, to be replayed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace paracomm::emulator {

class Crew;
class Stream;

/// What a stream does.
using Operation = std::function<void(Crew&)>;

/// Operations in the order of their capture, which keeps all dependencies: a replay does one after the other. (A GPU
/// may do independent ones at once, or may not.)
struct Graph {
  struct Node {
    Operation operation;
    std::vector<size_t> after;
  };
  std::vector<Node> nodes;

  void run(Crew& crew) const;
};

/// How strictly calls that a capture cannot hold are refused, as in CUDA.
enum class CaptureMode : uint8_t { global, thread_local_, relaxed };

/// A capture under way: the graph as far as it is known, and the streams that take part.
class Capture {
 public:
  Capture(std::shared_ptr<Stream> origin, CaptureMode mode);
  ~Capture();
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  const Stream* origin() const noexcept { return origin_.get(); }
  /// False: another thread has to end it.
  bool may_end_here() const noexcept;
  size_t add(Operation operation, const std::vector<size_t>& after);
  void add(const std::shared_ptr<Stream>& stream);
  /// Every stream that took part has been joined to what leads to `ends`.
  bool is_joined(const std::vector<size_t>& ends) const;
  /// Lets the streams go. The graph is the caller's from now on.
  Graph finish();
  /// A call that it cannot hold was made.
  void invalidate();
  bool is_valid() const;  ///< to be asked by the thread that may end it
  bool is_active() const;

  /// False: a capture under way forbids such calls as cudaMalloc in this thread; it is invalid from now on.
  static bool allows_unsafe_call();
  /// Sets how this thread's calls are judged; returns how they were.
  static CaptureMode exchange_thread_mode(CaptureMode mode);

 private:
  const std::shared_ptr<Stream> origin_;
  const CaptureMode mode_;
  const void* const thread_;
  const uint64_t violations_before_;
  mutable std::mutex mutex_;
  bool valid_ = true, active_ = true;
  Graph graph_;
  std::vector<std::shared_ptr<Stream>> streams_;
};

/// A place in a capture: what comes after `nodes`.
struct CapturePoint {
  std::shared_ptr<Capture> capture;
  std::vector<size_t> nodes;
};

}  // namespace paracomm::emulator
