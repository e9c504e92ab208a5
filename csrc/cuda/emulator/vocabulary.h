// CUDA's words for a C++ compiler: qualifiers, vector types, and the bits of numbers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

/// Tells device source that it is being built for the emulator.
#define PARACOMM_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __grid_constant__
/// A block never leaves its OS thread, therefore a thread's own variable is a block's.
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

namespace paracomm::emulator::api {

#define PARACOMM_EMULATOR_VECTOR(T, name, align2, align4)               \
  struct alignas(align2) name##2 { T x, y; };                           \
  struct name##3 { T x, y, z; };                                        \
  struct alignas(align4) name##4 { T x, y, z, w; };                     \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
PARACOMM_EMULATOR_VECTOR(signed char, char, 2, 4)
PARACOMM_EMULATOR_VECTOR(unsigned char, uchar, 2, 4)
PARACOMM_EMULATOR_VECTOR(short, short, 4, 8)
PARACOMM_EMULATOR_VECTOR(unsigned short, ushort, 4, 8)
PARACOMM_EMULATOR_VECTOR(int, int, 8, 16)
PARACOMM_EMULATOR_VECTOR(unsigned, uint, 8, 16)
PARACOMM_EMULATOR_VECTOR(long long, longlong, 16, 16)
PARACOMM_EMULATOR_VECTOR(unsigned long long, ulonglong, 16, 16)
PARACOMM_EMULATOR_VECTOR(float, float, 8, 16)
PARACOMM_EMULATOR_VECTOR(double, double, 16, 16)
#undef PARACOMM_EMULATOR_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

using std::max;
using std::min;

inline constexpr int warpSize = 32;

// --- bits ---
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }
inline int __ffsll(long long bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(bits)) + 1;
}

// --- arithmetic that is never contracted ---
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }

}  // namespace paracomm::emulator::api
