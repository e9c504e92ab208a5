// The OS threads that run the blocks of one stream's launches.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "block.h"
#include "gpu.h"

namespace paracomm::emulator {

class Crew {
 public:
  explicit Crew(Gpu& gpu) : gpu_(gpu) {}
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  Gpu& gpu() noexcept { return gpu_; }
  /// Returns when all blocks have ended, or the GPU failed. The calling thread runs blocks too.
  void run(const Kernel& kernel);

 private:
  struct Place {
    Launch* launch = nullptr;
    unsigned number = 0;  ///< of the block to begin with
    explicit operator bool() const noexcept { return launch != nullptr; }
  };
  void offer(Launch& launch, unsigned helpers);
  void wait_for_helpers();
  void help();
  Place take_place();
  void leave_launch();
  static void run_blocks(Launch& launch, uint64_t number, std::unique_ptr<Block>& block);

  Gpu& gpu_;
  uint64_t launches_ = 0;
  std::unique_ptr<Block> own_block_;
  std::mutex mutex_;
  std::condition_variable wanted_, finished_;
  Launch* launch_ = nullptr;
  unsigned places_ = 0;   ///< helpers that the launch still lacks: block 1 to `places_` wait for one
  unsigned helping_ = 0;  ///< helpers that it has, or lacks
  bool ending_ = false;
  std::vector<std::thread> helpers_;
};

}  // namespace paracomm::emulator
