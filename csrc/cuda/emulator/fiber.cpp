#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

// paracomm_emulator_switch(void** save, void* next): pushes what a call must preserve, leaves the stack pointer in
// *save and goes on with `next`, the stack pointer that an earlier call saved or `first_frame` made. Rounding modes are
// shared.
extern "C" void paracomm_emulator_switch(void** save, void* next);

#if defined(__x86_64__)
asm(R"(
.text
.hidden paracomm_emulator_switch
.globl paracomm_emulator_switch
.type paracomm_emulator_switch,@function
paracomm_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size paracomm_emulator_switch,.-paracomm_emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden paracomm_emulator_switch
.globl paracomm_emulator_switch
.type paracomm_emulator_switch,%function
paracomm_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size paracomm_emulator_switch,.-paracomm_emulator_switch
)");
#else
#error "the emulator switches fibers on x86-64 and AArch64 only; add paracomm_emulator_switch for this processor"
#endif

namespace paracomm::emulator {
namespace {

constexpr uint64_t kCanary = 0x5afe57ac5afe57ac;
constexpr size_t kGuardBytes = 4096;

/// The stack as paracomm_emulator_switch would have left it, had `entry` been about to run.
void* first_frame(std::byte* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(stack + Stacks::kBytes);
#if defined(__x86_64__)
  // From below: six registers, the address to return to, and a null one that ends every backtrace and leaves the stack
  // as a call does, 8 bytes off a multiple of 16.
  uint64_t* frame = top - 8;
  std::memset(frame, 0, 8 * sizeof *frame);
  frame[6] = reinterpret_cast<uint64_t>(entry);
#else
  uint64_t* frame = top - 20;
  std::memset(frame, 0, 20 * sizeof *frame);
  frame[11] = reinterpret_cast<uint64_t>(entry);  // x30
#endif
  return frame;
}

}  // namespace

Stacks::~Stacks() { release(); }

void Stacks::release() {
  if (base_ != nullptr) ::munmap(base_ - kGuardBytes, count_ * kBytes + kGuardBytes);
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  const size_t nbytes = count * kBytes + kGuardBytes;
  void* room = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) throw std::bad_alloc();
  // One for all: a page between each two would use up the mappings that a process may have. See stack_is_sound().
  ::mprotect(room, kGuardBytes, PROT_NONE);
  release();
  base_ = static_cast<std::byte*>(room) + kGuardBytes;
  count_ = count;
}

#if PARACOMM_EMULATOR_TSAN
Fiber::~Fiber() {
  if (stack_ != nullptr) __tsan_destroy_fiber(tsan_);
}
#else
Fiber::~Fiber() = default;
#endif

void Fiber::adopt_thread() {
#if PARACOMM_EMULATOR_TSAN
  tsan_ = __tsan_get_current_fiber();
#endif
}

void Fiber::prepare(std::byte* stack, void (*entry)()) {
#if PARACOMM_EMULATOR_TSAN
  // Kept from launch to launch: a stream's launches are ordered, and making one is slow.
  if (tsan_ == nullptr) tsan_ = __tsan_create_fiber(0);
#endif
#if PARACOMM_EMULATOR_ASAN
  permit(stack, Stacks::kBytes);
  bottom_ = stack;
  nbytes_ = Stacks::kBytes;
#endif
  stack_ = stack;
  std::memcpy(stack, &kCanary, sizeof kCanary);
  stack_pointer_ = first_frame(stack, entry);
}

PARACOMM_EMULATOR_UNSEEN void Fiber::switch_to(Fiber& next) {
#if PARACOMM_EMULATOR_ASAN
  // What ASan keeps for the frames of a fiber stays for the next kernel on it: to give it back costs a system call.
  next.came_from_ = this;
  __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.nbytes_);
#endif
#if PARACOMM_EMULATOR_TSAN
  __tsan_switch_to_fiber(next.tsan_, 1);  // 1: this orders nothing
#endif
  paracomm_emulator_switch(&stack_pointer_, next.stack_pointer_);
#if PARACOMM_EMULATOR_ASAN
  arrived();
#endif
}

#if PARACOMM_EMULATOR_ASAN
void Fiber::arrived() { __sanitizer_finish_switch_fiber(fake_stack_, &came_from_->bottom_, &came_from_->nbytes_); }
#endif

void Fiber::entered() {
#if PARACOMM_EMULATOR_ASAN
  arrived();
#endif
}

PARACOMM_EMULATOR_UNSEEN void Fiber::forsake([[maybe_unused]] Fiber& caller, [[maybe_unused]] const void* address) {
#if PARACOMM_EMULATOR_TSAN
  __tsan_switch_to_fiber(tsan_, 1);
  __tsan_release(const_cast<void*>(address));
  __tsan_switch_to_fiber(caller.tsan_, 1);
#endif
}

// Read as it stands, not by memcmp, which ThreadSanitizer watches: what overflows it is a fiber of this very thread.
PARACOMM_EMULATOR_UNSEEN bool Fiber::stack_is_sound() const noexcept {
  return *reinterpret_cast<const volatile uint64_t*>(stack_) == kCanary;
}

}  // namespace paracomm::emulator
