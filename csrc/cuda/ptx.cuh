// What CUDA C++ has no name for, in two versions: for a GPU and for the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda/namespace.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

#if defined(PARACOMM_EMULATED)

/// Before a loop whose count is known: what it indexes stays in registers.
#define PARACOMM_UNROLL _Pragma("GCC unroll 16")

/// All that this thread has seen and done is visible to whoever acquires the value, on any device.
__device__ __forceinline__ void store_release(uint64_t* to, uint64_t value) { emulator::store_release(to, value); }
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* from) { return emulator::load_acquire(from); }
/// No order with anything else.
__device__ __forceinline__ void store_relaxed(uint64_t* to, uint64_t value) { emulator::store_relaxed(to, value); }
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* from) { return emulator::load_relaxed(from); }
/// Nanoseconds of a clock that goes on at a steady rate on this device.
__device__ __forceinline__ uint64_t now_ns() { return emulator::globaltimer(); }
/// Between two looks at a flag.
__device__ __forceinline__ void pause_spin() { emulator::yield(); }

/// 16 bytes at an address that is a multiple of 16.
__device__ __forceinline__ uint4 load16(const std::byte* from) {
  uint4 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
__device__ __forceinline__ void store16(std::byte* to, uint4 value) { std::memcpy(to, &value, sizeof value); }

#else

#define PARACOMM_UNROLL _Pragma("unroll")

__device__ __forceinline__ void store_release(uint64_t* to, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
  return value;
}
__device__ __forceinline__ void pause_spin() { __nanosleep(20); }

__device__ __forceinline__ uint4 load16(const std::byte* from) { return *reinterpret_cast<const uint4*>(from); }
__device__ __forceinline__ void store16(std::byte* to, uint4 value) { *reinterpret_cast<uint4*>(to) = value; }

#endif

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
