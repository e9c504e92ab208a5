#include "graph.h"

#include <atomic>
#include <utility>

#include "stream.h"

namespace paracomm::emulator {
namespace {

// Of all threads: how many captures forbid what, and how often somebody did it.
std::atomic<int> global_captures{0};
std::atomic<uint64_t> violations{0};
// Of this thread: captures that are not relaxed, and violations.
thread_local int own_captures = 0;
thread_local uint64_t own_violations = 0;
thread_local CaptureMode thread_mode = CaptureMode::global;

const void* this_thread() { return &own_captures; }

uint64_t violations_of(CaptureMode mode) {
  return mode == CaptureMode::global ? violations.load(std::memory_order_relaxed) : own_violations;
}

}  // namespace

void Graph::run(Crew& crew) const {
  for (const Node& node : nodes)
    if (!crew.gpu().stopped()) node.operation(crew);
}

Capture::Capture(std::shared_ptr<Stream> origin, CaptureMode mode)
    : origin_(std::move(origin)), mode_(mode), thread_(this_thread()), violations_before_(violations_of(mode)) {
  streams_.push_back(origin_);
  if (mode_ == CaptureMode::global) global_captures.fetch_add(1, std::memory_order_relaxed);
  if (mode_ != CaptureMode::relaxed) ++own_captures;
}

Capture::~Capture() = default;

bool Capture::may_end_here() const noexcept { return mode_ == CaptureMode::relaxed || thread_ == this_thread(); }

size_t Capture::add(Operation operation, const std::vector<size_t>& after) {
  const std::lock_guard lock(mutex_);
  graph_.nodes.push_back({std::move(operation), after});
  return graph_.nodes.size() - 1;
}

void Capture::add(const std::shared_ptr<Stream>& stream) {
  const std::lock_guard lock(mutex_);
  streams_.push_back(stream);
}

bool Capture::is_joined(const std::vector<size_t>& ends) const {
  const std::lock_guard lock(mutex_);
  std::vector<bool> reached(graph_.nodes.size(), false);
  for (const size_t node : ends) reached[node] = true;
  // Nodes come after those that they follow.
  for (size_t i = reached.size(); i-- > 0;) {
    if (!reached[i]) return false;
    for (const size_t before : graph_.nodes[i].after) reached[before] = true;
  }
  return true;
}

Graph Capture::finish() {
  std::vector<std::shared_ptr<Stream>> streams;
  Graph graph;
  {
    const std::lock_guard lock(mutex_);
    active_ = false;
    streams.swap(streams_);
    graph = std::move(graph_);
  }
  for (const std::shared_ptr<Stream>& stream : streams) stream->end_capture();
  if (mode_ == CaptureMode::global) global_captures.fetch_sub(1, std::memory_order_relaxed);
  if (mode_ != CaptureMode::relaxed) --own_captures;
  return graph;
}

void Capture::invalidate() {
  const std::lock_guard lock(mutex_);
  valid_ = false;
}

bool Capture::is_valid() const {
  const std::lock_guard lock(mutex_);
  return valid_ && (mode_ == CaptureMode::relaxed || violations_of(mode_) == violations_before_);
}

bool Capture::is_active() const {
  const std::lock_guard lock(mutex_);
  return active_;
}

bool Capture::allows_unsafe_call() {
  if (thread_mode == CaptureMode::relaxed) return true;
  const bool others = thread_mode == CaptureMode::global && global_captures.load(std::memory_order_relaxed) > 0;
  if (own_captures == 0 && !others) return true;
  ++own_violations;
  violations.fetch_add(1, std::memory_order_relaxed);
  return false;
}

CaptureMode Capture::exchange_thread_mode(CaptureMode mode) { return std::exchange(thread_mode, mode); }

}  // namespace paracomm::emulator
