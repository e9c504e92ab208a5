// Stands in for CUDA's header of this name: float16, with conversions that give the bits of the hardware.
#pragma once

#include "vocabulary.h"

namespace paracomm::emulator::api {

struct __half_raw {
  unsigned short x;
};
struct alignas(2) __half {
  unsigned short x;
  __half() = default;
  __half(__half_raw raw) : x(raw.x) {}
  operator __half_raw() const { return {x}; }
};
using half = __half;
struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline unsigned short __half_as_ushort(__half value) { return value.x; }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }

/// Rounds to nearest, ties to even. Every NaN becomes 0x7fff.
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  const auto half_of = [](unsigned result) { return __ushort_as_half(static_cast<unsigned short>(result)); };
  if (magnitude > 0x7f800000) return half_of(0x7fff);
  if (magnitude >= 0x477ff000) return half_of(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000) {
    // Below the smallest normal: adding 0.5 lines its last bit up with the float's, and the addition rounds.
    return half_of(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000));
  }
  return half_of(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
inline __half __float2half(float value) { return __float2half_rn(value); }

/// Exact. Every NaN becomes 0x7fffffff.
inline float __half2float(__half value) {
  const unsigned magnitude = value.x & 0x7fffu, sign = (value.x & 0x8000u) << 16;
  if (magnitude > 0x7c00) return __uint_as_float(0x7fffffff);
  if (magnitude == 0x7c00) return __uint_as_float(sign | 0x7f800000);
  if (magnitude < 0x400) return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, __uint_as_float(sign));
  return __uint_as_float(sign | ((magnitude << 13) + 0x38000000));
}

inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline __half2 __float22half2_rn(float2 pair) { return __floats2half2_rn(pair.x, pair.y); }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }

}  // namespace paracomm::emulator::api

using namespace paracomm::emulator::api;
