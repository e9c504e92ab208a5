// Fibers: stacks that one OS thread switches between.
#pragma once

#include <cstddef>

#include "sanitizers.h"

namespace paracomm::emulator {

/// Memory for the stacks of many fibers: reserved at once, backed by the system where it is touched.
class Stacks {
 public:
  /// A kernel's frames are small; instrumented ones are not.
  static constexpr size_t kBytes = (PARACOMM_EMULATOR_TSAN || PARACOMM_EMULATOR_ASAN) ? 256 << 10 : 64 << 10;

  Stacks() = default;
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  /// At least `count` stacks, of which none is in use. Throws std::bad_alloc.
  void reserve(size_t count);
  std::byte* stack(size_t index) const noexcept { return base_ + index * kBytes; }

 private:
  void release();

  std::byte* base_ = nullptr;
  size_t count_ = 0;
};

/// Where a fiber, or the thread that switches to fibers, goes on. To ThreadSanitizer each is a thread of its own.
class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Becomes the calling thread, which may then switch to fibers.
  void adopt_thread();
  /// To begin with `entry` (which never returns) on this stack, whatever ran there before.
  void prepare(std::byte* stack, void (*entry)());
  /// Goes on with `next`; returns when somebody switches back here.
  void switch_to(Fiber& next);
  /// Never goes on: what it did `happens_before(address)`. The calling thread is the one adopted by `caller`.
  void forsake(Fiber& caller, const void* address);
  /// To be called first of all by `entry`.
  void entered();
  /// False: a frame has run over the end of the stack, and into its neighbour.
  bool stack_is_sound() const noexcept;

 private:
  void* stack_pointer_ = nullptr;
  std::byte* stack_ = nullptr;
#if PARACOMM_EMULATOR_TSAN
  void* tsan_ = nullptr;
#endif
#if PARACOMM_EMULATOR_ASAN
  void arrived();

  Fiber* came_from_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t nbytes_ = 0;
#endif
};

}  // namespace paracomm::emulator
