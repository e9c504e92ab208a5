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

void Crew::run(const Kernel& kernel) {
  constexpr uint64_t kMost = Gpu::kMultiprocessors * Gpu::kBlocksPerMultiprocessor;
  Launch launch{kernel, gpu_, seed_of_launch(gpu_.index(), launches_++)};
  const auto helpers = static_cast<unsigned>(std::min(kernel.blocks(), kMost) - 1);
  while (helpers_.size() < helpers) helpers_.emplace_back(&Crew::help, this);
  {
    const std::lock_guard lock(mutex_);
    launch_ = &launch;
    places_ = helping_ = helpers;
  }
  if (helpers > 0) wanted_.notify_all();
  run_blocks(launch, own_block_);
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [this] { return helping_ == 0; });
}

void Crew::help() {
  std::unique_ptr<Block> block;
  std::unique_lock lock(mutex_);
  for (;;) {
    wanted_.wait(lock, [this] { return ending_ || places_ > 0; });
    if (ending_) return;
    --places_;
    Launch& launch = *launch_;
    lock.unlock();
    run_blocks(launch, block);
    lock.lock();
    if (--helping_ == 0) finished_.notify_one();
  }
}

void Crew::run_blocks(Launch& launch, std::unique_ptr<Block>& block) {
  if (block == nullptr) block = std::make_unique<Block>();
  while (launch.gpu.occupy()) {
    const uint64_t number = launch.next_block.fetch_add(1, std::memory_order_relaxed);
    if (number < launch.kernel.blocks()) block->run(launch, number);
    launch.gpu.vacate();
    if (number >= launch.kernel.blocks()) return;
  }
  block.reset();  // of a GPU that failed: its threads are lost in the middle of something
}

}  // namespace paracomm::emulator
