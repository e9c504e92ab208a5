// What the emulator tells the sanitizers: fibers are threads of their own, and its own book-keeping orders nobody.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#define PARACOMM_EMULATOR_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define PARACOMM_EMULATOR_TSAN 1
#endif
#endif
#ifndef PARACOMM_EMULATOR_TSAN
#define PARACOMM_EMULATOR_TSAN 0
#endif

#if defined(__SANITIZE_ADDRESS__)
#define PARACOMM_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PARACOMM_EMULATOR_ASAN 1
#endif
#endif
#ifndef PARACOMM_EMULATOR_ASAN
#define PARACOMM_EMULATOR_ASAN 0
#endif

#if PARACOMM_EMULATOR_TSAN
/// For what is shared between the fibers of one block, which never run at once: no race, whatever the sanitizer thinks.
#define PARACOMM_EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
#define PARACOMM_EMULATOR_UNSEEN
#endif

#if PARACOMM_EMULATOR_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t nbytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_nbytes);
void __asan_poison_memory_region(const volatile void* begin, size_t nbytes);
void __asan_unpoison_memory_region(const volatile void* begin, size_t nbytes);
}
#endif

namespace paracomm::emulator {

/// What others did before their `happens_before(address)` is done for whoever comes by `happens_after(address)`.
PARACOMM_EMULATOR_UNSEEN inline void happens_before([[maybe_unused]] const void* address) {
#if PARACOMM_EMULATOR_TSAN
  __tsan_release(const_cast<void*>(address));
#endif
}
PARACOMM_EMULATOR_UNSEEN inline void happens_after([[maybe_unused]] const void* address) {
#if PARACOMM_EMULATOR_TSAN
  __tsan_acquire(const_cast<void*>(address));
#endif
}

/// No byte of the region may be touched, as far as a sanitizer can see that.
inline void forbid([[maybe_unused]] const void* begin, [[maybe_unused]] size_t nbytes) {
#if PARACOMM_EMULATOR_ASAN
  __asan_poison_memory_region(begin, nbytes);
#endif
}
inline void permit([[maybe_unused]] const void* begin, [[maybe_unused]] size_t nbytes) {
#if PARACOMM_EMULATOR_ASAN
  __asan_unpoison_memory_region(begin, nbytes);
#endif
}

/// While one lives, what this thread locks, reads and writes is invisible to ThreadSanitizer. State that all emulated
/// GPUs share is touched under it only: a lock there would order two ranks, and so hide a fence that they lack.
class Unobserved {
 public:
  Unobserved() {
#if PARACOMM_EMULATOR_TSAN
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Unobserved() {
#if PARACOMM_EMULATOR_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
#endif
  }
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;
};

}  // namespace paracomm::emulator
