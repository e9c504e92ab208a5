#include "gpu.h"

#include <time.h>

#include <cstdlib>

#include "sanitizers.h"
#include "stream.h"

namespace paracomm::emulator {
namespace {

constexpr int kDefaultDevices = 8, kMostDevices = 64;

std::atomic<double> patience_s{60};

int configured_devices() {
  const char* text = std::getenv("PARACOMM_EMULATED_DEVICES");
  if (text == nullptr || *text == '\0') return kDefaultDevices;
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  return *end == '\0' && count >= 0 && count <= kMostDevices ? static_cast<int>(count) : -1;
}

void nap() {
  const timespec time{0, 1'000'000};
  ::nanosleep(&time, nullptr);
}

}  // namespace

int Gpu::count() {
  static const int count = configured_devices();
  return count;
}

// Kept for good: threads of streams may outlive main().
Gpu& Gpu::at(int index) {
  static std::deque<Gpu*>& gpus = *[] {
    auto* all = new std::deque<Gpu*>;
    for (int i = 0; i < count(); ++i) all->push_back(new Gpu(i));
    return all;
  }();
  return *gpus[static_cast<size_t>(index)];
}

std::chrono::duration<double> Gpu::patience() {
  return std::chrono::duration<double>(patience_s.load(std::memory_order_relaxed));
}
void Gpu::set_patience(double seconds) { patience_s.store(seconds, std::memory_order_relaxed); }

// Blocks of one GPU that follow one another are not ordered by that.
bool Gpu::occupy() {
  const Unobserved unobserved;
  std::unique_lock lock(mutex_);
  // A failure may come without a notification.
  while (occupied_ == kMultiprocessors * kBlocksPerMultiprocessor && error() == 0)
    vacated_.wait_for(lock, std::chrono::milliseconds(20));
  if (error() != 0) return false;
  ++occupied_;
  return true;
}

void Gpu::vacate() {
  const Unobserved unobserved;
  {
    const std::lock_guard lock(mutex_);
    --occupied_;
  }
  vacated_.notify_one();
}

void Gpu::fail(int error, const std::string& report) {
  const Unobserved unobserved;
  const std::lock_guard lock(mutex_);
  if (error_.load(std::memory_order_relaxed) != 0) return;
  reports_.push_back("GPU " + std::to_string(index_) + ", " + report);
  report_.store(reports_.back().c_str(), std::memory_order_release);
  error_.store(error, std::memory_order_release);
}

void Gpu::reset() {
  const Unobserved unobserved;
  const std::lock_guard lock(mutex_);
  stalled_.store(false, std::memory_order_relaxed);
  report_.store("", std::memory_order_relaxed);
  error_.store(0, std::memory_order_relaxed);
  peers_.clear();
}

bool Gpu::enable_peer(int peer) {
  const Unobserved unobserved;
  const std::lock_guard lock(mutex_);
  return peers_.insert(peer).second;
}

bool Gpu::stopped() const {
  while (stalled_.load(std::memory_order_relaxed) && error() == 0) nap();
  return error() != 0;
}

std::shared_ptr<Stream> Gpu::default_stream() {
  const std::lock_guard lock(mutex_);
  if (default_stream_ == nullptr) {
    default_stream_ = std::make_shared<Stream>(*this, Stream::Kind::legacy, 0);
    streams_.push_back(default_stream_);
  }
  return default_stream_;
}

void Gpu::add(const std::shared_ptr<Stream>& stream) {
  const std::lock_guard lock(mutex_);
  std::erase_if(streams_, [](const std::weak_ptr<Stream>& known) { return known.expired(); });
  streams_.push_back(stream);
}

std::vector<std::shared_ptr<Stream>> Gpu::streams() {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Stream>> alive;
  for (const std::weak_ptr<Stream>& known : streams_)
    if (auto stream = known.lock()) alive.push_back(std::move(stream));
  return alive;
}

void Gpu::synchronize() {
  for (const std::shared_ptr<Stream>& stream : streams()) stream->wait(stream->submitted());
}

}  // namespace paracomm::emulator
