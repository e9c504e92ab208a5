// Elements as they lie in memory and what they accumulate in, and the operators: the device's twin of reduce/loops.h.
#pragma once

#include <cuda_fp16.h>

#include <cuda_bf16.h>

#include "core/dtype.h"
#include "cuda/ptx.cuh"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

/// Lane `i` of 16 bytes. `i` is known when the loop around it is unrolled, so that all stays in registers.
template <class T>
__device__ __forceinline__ T get_lane(const uint4& v, int i) {
  const int byte = i * static_cast<int>(sizeof(T)), word = byte / 4;
  const uint32_t low = word == 0 ? v.x : word == 1 ? v.y : word == 2 ? v.z : v.w;
  if constexpr (sizeof(T) == 8) return static_cast<T>(low | static_cast<uint64_t>(word == 0 ? v.y : v.w) << 32);
  return static_cast<T>(low >> (byte % 4 * 8));
}
/// Lanes are set in their order, into what was zero.
template <class T>
__device__ __forceinline__ void set_lane(uint4& v, int i, T value) {
  const int byte = i * static_cast<int>(sizeof(T)), word = byte / 4;
  uint32_t& low = word == 0 ? v.x : word == 1 ? v.y : word == 2 ? v.z : v.w;
  if constexpr (sizeof(T) == 8) {
    low = static_cast<uint32_t>(value);
    (word == 0 ? v.y : v.w) = static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32);
  } else {
    low |= static_cast<uint32_t>(value) << (byte % 4 * 8);
  }
}

/// Stored: unsigned bits of an element. Sum: what it accumulates in.
struct Float64 {
  using Stored = uint64_t;
  using Sum = double;
  static constexpr bool kBitwise = false;
  static __device__ __forceinline__ Sum get(Stored bits) { return __longlong_as_double(static_cast<long long>(bits)); }
  static __device__ __forceinline__ Stored put(Sum value) { return static_cast<Stored>(__double_as_longlong(value)); }
  static __device__ __forceinline__ Sum divide(Sum value, int divisor) { return value / divisor; }
  static __device__ __forceinline__ bool less(Sum a, Sum b) { return a < b; }
};

struct Float32 {
  using Stored = uint32_t;
  using Sum = float;
  static constexpr bool kBitwise = false;
  static __device__ __forceinline__ Sum get(Stored bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Stored put(Sum value) { return __float_as_uint(value); }
  static __device__ __forceinline__ Sum divide(Sum value, int divisor) { return value / static_cast<float>(divisor); }
  static __device__ __forceinline__ bool less(Sum a, Sum b) { return a < b; }
};

struct Float16 : Float32 {
  using Stored = uint16_t;
  static __device__ __forceinline__ Sum get(Stored bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ Stored put(Sum value) { return __half_as_ushort(__float2half_rn(value)); }
};

struct BFloat16 : Float32 {
  using Stored = uint16_t;
  static __device__ __forceinline__ Sum get(Stored bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  static __device__ __forceinline__ Stored put(Sum value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
};

/// Sums and products wrap around, which unsigned arithmetic does; order and division follow the sign.
template <class Unsigned, class Number>
struct Integer {
  using Stored = Unsigned;
  using Sum = Unsigned;
  static constexpr bool kBitwise = true;
  static __device__ __forceinline__ Sum get(Stored bits) { return bits; }
  static __device__ __forceinline__ Stored put(Sum value) { return value; }
  static __device__ __forceinline__ Sum divide(Sum value, int divisor) {
    if constexpr (static_cast<Number>(-1) > 0) return static_cast<Sum>(value / static_cast<uint64_t>(divisor));
    return static_cast<Sum>(static_cast<int64_t>(static_cast<Number>(value)) / divisor);
  }
  static __device__ __forceinline__ bool less(Sum a, Sum b) { return static_cast<Number>(a) < static_cast<Number>(b); }
};

inline bool is_floating(DType dtype) {
  return dtype == DType::float64 || dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

/// Calls run(E()) for the elements of that floating-point dtype.
template <class Run>
auto with_floating(DType dtype, Run run) {
  switch (dtype) {
    case DType::float64:
      return run(Float64());
    case DType::float32:
      return run(Float32());
    case DType::float16:
      return run(Float16());
    default:
      return run(BFloat16());
  }
}

/// Calls run(E()) for the elements of that dtype.
template <class Run>
auto with_element(DType dtype, Run run) {
  if (is_floating(dtype)) return with_floating(dtype, run);
  switch (dtype) {
    case DType::int8:
      return run(Integer<uint8_t, int8_t>());
    case DType::int16:
      return run(Integer<uint16_t, int16_t>());
    case DType::int32:
      return run(Integer<uint32_t, int32_t>());
    case DType::int64:
      return run(Integer<uint64_t, int64_t>());
    case DType::uint16:
      return run(Integer<uint16_t, uint16_t>());
    case DType::uint32:
      return run(Integer<uint32_t, uint32_t>());
    case DType::uint64:
      return run(Integer<uint64_t, uint64_t>());
    default:
      return run(Integer<uint8_t, uint8_t>());
  }
}

template <class E>
constexpr int kLanes = 16 / static_cast<int>(sizeof(typename E::Stored));

struct Add {
  template <class E>
  static __device__ __forceinline__ typename E::Sum apply(typename E::Sum a, typename E::Sum b) {
    return static_cast<typename E::Sum>(a + b);
  }
};
struct Multiply {
  template <class E>
  static __device__ __forceinline__ typename E::Sum apply(typename E::Sum a, typename E::Sum b) {
    // Two uint16_t would be promoted to int, and their product overflows it.
    if constexpr (E::kBitwise && sizeof(a) < 4) return static_cast<typename E::Sum>(uint32_t{a} * b);
    return static_cast<typename E::Sum>(a * b);
  }
};
/// a stays where it is a NaN, b comes where it is a NaN.
struct Min {
  template <class E>
  static __device__ __forceinline__ typename E::Sum apply(typename E::Sum a, typename E::Sum b) {
    return E::less(a, b) || a != a ? a : b;
  }
};
struct Max {
  template <class E>
  static __device__ __forceinline__ typename E::Sum apply(typename E::Sum a, typename E::Sum b) {
    return E::less(b, a) || a != a ? a : b;
  }
};
struct And {
  template <class E>
  static __device__ __forceinline__ typename E::Sum apply(typename E::Sum a, typename E::Sum b) {
    return a & b;
  }
};
struct Or {
  template <class E>
  static __device__ __forceinline__ typename E::Sum apply(typename E::Sum a, typename E::Sum b) {
    return a | b;
  }
};
struct Xor {
  template <class E>
  static __device__ __forceinline__ typename E::Sum apply(typename E::Sum a, typename E::Sum b) {
    return a ^ b;
  }
};

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
