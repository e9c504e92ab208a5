// Loads, stores and atomic operations on memory that others use at the same time.
//
// A scope (block, device, system) is accepted and means nothing here: all emulated memory is coherent.
#pragma once

#include <type_traits>

#include "execution.h"

namespace paracomm::emulator {

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

// --- what PTX spells ld.relaxed, ld.acquire, st.relaxed, st.release, each with .sys; never contained in CUDA C++ ---
template <class T>
T load_relaxed(const T* from) {
  T value;
  __atomic_load(from, &value, __ATOMIC_RELAXED);
  observed(from, bits_of(value));
  return value;
}
template <class T>
T load_acquire(const T* from) {
  T value;
  __atomic_load(from, &value, __ATOMIC_ACQUIRE);
  observed(from, bits_of(value));
  return value;
}
template <class T>
void store_release(T* to, T value) {
  preempt();
  __atomic_store(to, &value, __ATOMIC_RELEASE);
}
template <class T>
void store_relaxed(T* to, T value) {
  if (fenced()) return store_release(to, value);
  preempt();
  __atomic_store(to, &value, __ATOMIC_RELAXED);
}

/// Replaces *at by change(*at), and returns what was there.
template <class T, class Change>
T update(T* at, Change change) {
  preempt();
  T before, after;
  __atomic_load(at, &before, __ATOMIC_RELAXED);
  bool done = false;
  while (!done) {
    after = change(before);
    done = fenced() ? __atomic_compare_exchange(at, &before, &after, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED)
                    : __atomic_compare_exchange(at, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }
  observed(at, bits_of(before));
  return before;
}

namespace api {

/// Each atomic function in its three scopes; the second operand has the first one's type, as in CUDA's overloads.
#define PARACOMM_EMULATOR_ATOMIC(name, change)                   \
  template <class T>                                             \
  T name(T* at, std::type_identity_t<T> operand) {               \
    return update(at, [operand](T now) -> T { return change; }); \
  }                                                              \
  template <class T>                                             \
  T name##_block(T* at, std::type_identity_t<T> operand) {       \
    return name(at, operand);                                    \
  }                                                              \
  template <class T>                                             \
  T name##_system(T* at, std::type_identity_t<T> operand) {      \
    return name(at, operand);                                    \
  }
PARACOMM_EMULATOR_ATOMIC(atomicAdd, static_cast<T>(now + operand))
PARACOMM_EMULATOR_ATOMIC(atomicSub, static_cast<T>(now - operand))
PARACOMM_EMULATOR_ATOMIC(atomicExch, (static_cast<void>(now), operand))
PARACOMM_EMULATOR_ATOMIC(atomicMin, now < operand ? now : operand)
PARACOMM_EMULATOR_ATOMIC(atomicMax, now > operand ? now : operand)
PARACOMM_EMULATOR_ATOMIC(atomicAnd, now& operand)
PARACOMM_EMULATOR_ATOMIC(atomicOr, now | operand)
PARACOMM_EMULATOR_ATOMIC(atomicXor, now ^ operand)
PARACOMM_EMULATOR_ATOMIC(atomicInc, now >= operand ? 0 : now + 1)
PARACOMM_EMULATOR_ATOMIC(atomicDec, now == 0 || now > operand ? operand : now - 1)
#undef PARACOMM_EMULATOR_ATOMIC

template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return update(at, [=](T now) { return now == expected ? desired : now; });
}
template <class T>
T atomicCAS_block(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return atomicCAS(at, expected, desired);
}
template <class T>
T atomicCAS_system(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return atomicCAS(at, expected, desired);
}

}  // namespace api
}  // namespace paracomm::emulator
