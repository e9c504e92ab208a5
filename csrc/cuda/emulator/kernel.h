// CUDA's built-ins for kernels: indices, barriers, shuffles, votes, fences, clocks.
#pragma once

#include "execution.h"

#define threadIdx (::paracomm::emulator::thread_index())
#define blockIdx (::paracomm::emulator::block_index())
#define blockDim (::paracomm::emulator::block_dim())
#define gridDim (::paracomm::emulator::grid_dim())

namespace paracomm::emulator {

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Exchange exchange{.call = WarpCall::shuffle, .mask = mask, .source = source};
  std::memcpy(&exchange.value, &value, sizeof value);
  meet(exchange, where);
  std::memcpy(&value, &exchange.received, sizeof value);
  return value;
}

inline uint32_t vote(unsigned mask, bool predicate, Where where) {
  Exchange exchange{.call = WarpCall::vote, .mask = mask, .predicate = predicate};
  meet(exchange, where);
  return exchange.ballot;
}

namespace api {

inline void __syncthreads(Where where = Where::current()) { sync_threads(false, where); }
inline int __syncthreads_count(int predicate, Where where = Where::current()) {
  return sync_threads(predicate != 0, where);
}
inline int __syncthreads_or(int predicate, Where where = Where::current()) {
  return sync_threads(predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, Where where = Where::current()) {
  return sync_threads(predicate == 0, where) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, Where where = Where::current()) {
  Exchange exchange{.mask = mask};
  meet(exchange, where);
}
inline unsigned __activemask() { return lanes_alive(); }

// Lanes beyond the end of a segment of `width` lanes keep their own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, Where where = Where::current()) {
  const unsigned first = lane() & ~(static_cast<unsigned>(width) - 1);
  return shuffle(mask, value, first | (static_cast<unsigned>(source) & (static_cast<unsigned>(width) - 1)), where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, Where where = Where::current()) {
  const unsigned end = (lane() & ~(static_cast<unsigned>(width) - 1)) + static_cast<unsigned>(width);
  return shuffle(mask, value, lane() + delta < end ? lane() + delta : lane(), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, Where where = Where::current()) {
  const unsigned first = lane() & ~(static_cast<unsigned>(width) - 1);
  return shuffle(mask, value, lane() >= first + delta ? lane() - delta : lane(), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = warpSize, Where where = Where::current()) {
  const unsigned end = (lane() & ~(static_cast<unsigned>(width) - 1)) + static_cast<unsigned>(width);
  const unsigned source = lane() ^ static_cast<unsigned>(flip);
  return shuffle(mask, value, source < end ? source : lane(), where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return vote(mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return vote(mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return vote(mask, predicate == 0, where) == 0;
}

inline void __threadfence() { fence(); }
inline void __threadfence_system() { fence(); }
inline void __threadfence_block() { fence(); }

inline void __nanosleep(unsigned) { yield(); }
inline long long clock64() { return static_cast<long long>(globaltimer()); }
[[noreturn]] inline void __trap(Where where = Where::current()) { trap("__trap()", where); }

// Hints to caches that are not there.
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

}  // namespace api
}  // namespace paracomm::emulator
