#include "crew.h"

#include <algorithm>

#include "control.h"

namespace paracomm::emulator {
namespace {

std::atomic<uint64_t> chosen_seed{0};

/// Differs from launch to launch and from GPU to GPU; 0 where nothing is to be disturbed.
uint64_t seed_of_launch(int gpu, uint64_t launch) {
  const uint64_t seed = chosen_seed.load(std::memory_order_relaxed);
  if (seed == 0) return 0;
  return Random(seed ^ (static_cast<uint64_t>(gpu) << 56) ^ (launch << 24)).next() | 1;
}

}  // namespace

void set_seed(uint64_t seed) { chosen_seed.store(seed, std::memory_order_relaxed); }

Crew::~Crew() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  wanted_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

// The lock must not order blocks: one that begins late would seem to come after those that have ended. A launch comes
// after the one before, and what follows on it comes after its blocks, and no more is told to ThreadSanitizer.
void Crew::run(const Kernel& kernel) {
  constexpr uint64_t kMost = Gpu::kMultiprocessors * Gpu::kBlocksPerMultiprocessor;
  const auto helpers = static_cast<unsigned>(std::min(kernel.blocks(), kMost) - 1);
  Launch launch{kernel, gpu_, seed_of_launch(gpu_.index(), launches_++), helpers + 1};
  while (helpers_.size() < helpers) helpers_.emplace_back(&Crew::help, this);
  happens_before(this);
  offer(launch, helpers);
  run_blocks(launch, 0, own_block_);
  wait_for_helpers();
  happens_after(&launch);
}

void Crew::offer(Launch& launch, unsigned helpers) {
  const Unobserved unobserved;
  {
    const std::lock_guard lock(mutex_);
    launch_ = &launch;
    places_ = helping_ = helpers;
  }
  if (helpers > 0) wanted_.notify_all();
}

void Crew::wait_for_helpers() {
  const Unobserved unobserved;
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [this] { return helping_ == 0; });
}

void Crew::help() {
  std::unique_ptr<Block> block;
  while (const Place place = take_place()) {
    happens_after(this);
    run_blocks(*place.launch, place.number, block);
    happens_before(place.launch);
    leave_launch();
  }
}

/// Waits for a launch that lacks helpers. No launch: there will be none.
Crew::Place Crew::take_place() {
  const Unobserved unobserved;
  std::unique_lock lock(mutex_);
  wanted_.wait(lock, [this] { return ending_ || places_ > 0; });
  if (ending_) return {};
  return {launch_, places_--};
}

void Crew::leave_launch() {
  const Unobserved unobserved;
  const std::lock_guard lock(mutex_);
  if (--helping_ == 0) finished_.notify_one();
}

// The first blocks have a thread each, as on a GPU that has room for them: none comes after another.
void Crew::run_blocks(Launch& launch, uint64_t number, std::unique_ptr<Block>& block) {
  if (block == nullptr) block = std::make_unique<Block>();
  for (; number < launch.kernel.blocks(); number = launch.next_block.fetch_add(1, std::memory_order_relaxed)) {
    if (!launch.gpu.occupy()) break;
    block->run(launch, number);
    launch.gpu.vacate();
  }
  // The threads of a GPU that failed are lost in the middle of something.
  if (launch.gpu.error() != 0) block.reset();
}

}  // namespace paracomm::emulator
