// The reduction loops, once, for whatever instruction set the including file is compiled for (see loops_*.cpp).
//
// Everything here has internal linkage and uses no standard templates, for the reason that pack.h gives.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "reduce/pack.h"
#include "reduce/table.h"

namespace paracomm {
namespace {

constexpr int kUnroll = 4;

// --- elements: how they lie in memory, what they accumulate in ---

/// What integers are divided as.
template <bool kUnsigned>
struct Division {
  using Type = int64_t;
};
template <>
struct Division<true> {
  using Type = uint64_t;
};

template <class T, class S = T>
struct Plain {
  using Stored = T;
  using Sum = T;
  using Quotient = typename Division<(static_cast<S>(-1) > 0)>::Type;
  template <int N>
  static PARACOMM_INLINE Pack<T, N> get(const T* from) {
    return load<Pack<T, N>>(from);
  }
  template <int N>
  static PARACOMM_INLINE void put(T* to, Pack<T, N> pack) {
    store(to, pack);
  }
  template <int N>
  static PARACOMM_INLINE Pack<T, N> divide(Pack<T, N> pack, int divisor) {
    if constexpr (static_cast<T>(0.5) != 0) {
      return pack / static_cast<T>(divisor);
    } else if constexpr (N == 1) {
      return static_cast<T>(static_cast<Quotient>(static_cast<S>(pack)) / static_cast<Quotient>(divisor));
    } else {
      for (int i = 0; i < N; ++i)
        pack[i] = static_cast<T>(static_cast<Quotient>(static_cast<S>(pack[i])) / static_cast<Quotient>(divisor));
      return pack;
    }
  }
};

/// What float16 and bfloat16 share: they accumulate in float32.
struct Sixteen {
  using Stored = uint16_t;
  using Sum = float;
  template <int N>
  static PARACOMM_INLINE Pack<float, N> divide(Pack<float, N> pack, int divisor) {
    return pack / static_cast<float>(divisor);
  }
};

struct BFloat16 : Sixteen {
  template <int N>
  static PARACOMM_INLINE Pack<float, N> get(const uint16_t* from) {
    return bits_as<Pack<float, N>>(
        static_cast<Pack<uint32_t, N>>(convert<uint32_t, N>(load<Pack<uint16_t, N>>(from)) << 16));
  }
  template <int N>
  static PARACOMM_INLINE void put(uint16_t* to, Pack<float, N> pack) {
    const auto bits = bits_as<Pack<uint32_t, N>>(pack);
    // Half of the last kept bit, less one where that bit is even: ties go to even. A NaN could round up to infinity, so
    // it only loses its low bits and becomes quiet.
    const Pack<uint32_t, N> rounded = (bits + ((bits >> 16 & 1) + 0x7fff)) >> 16;
    const Pack<uint32_t, N> quiet = bits >> 16 | 0x40;
    const Pack<uint32_t, N> result = (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
    store(to, convert<uint16_t, N>(result));
  }
};

struct Float16 : Sixteen {
  template <int N>
  static PARACOMM_INLINE Pack<float, N> get(const uint16_t* from) {
#if defined(__AVX512F__)
    // All lanes, by way of a mask: g++ 12 warns of its own undefined register in the plain intrinsic.
    if constexpr (N == 16) return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return _mm256_cvtph_ps(load<__m128i>(from));
    if constexpr (N == 1) return _cvtsh_ss(*from);
#endif
    using U = Pack<uint32_t, N>;
    const U half = convert<uint32_t, N>(load<Pack<uint16_t, N>>(from));
    const U magnitude = (half & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
    const U normal = magnitude + (112u << 23);
    // A subnormal has no hidden bit: give it one by its exponent, and take it off as a float.
    const auto below = bits_as<U>(static_cast<Pack<float, N>>(bits_as<Pack<float, N>>(normal + (1u << 23)) - 0x1p-14f));
    const U special =
        (normal + (112u << 23)) | (magnitude > 0x0f800000 ? magnitude - magnitude + 0x400000 : magnitude - magnitude);
    const U result = exponent == 0x0f800000 ? special : exponent == 0 ? below : normal;
    return bits_as<Pack<float, N>>(static_cast<U>(result | (half & 0x8000) << 16));
  }
  template <int N>
  static PARACOMM_INLINE void put(uint16_t* to, Pack<float, N> pack) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return store(to, _mm512_maskz_cvtps_ph(0xffff, pack, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return store(to, _mm256_cvtps_ph(pack, _MM_FROUND_TO_NEAREST_INT));
    if constexpr (N == 1) return store(to, static_cast<uint16_t>(_cvtss_sh(pack, _MM_FROUND_TO_NEAREST_INT)));
#endif
    using U = Pack<uint32_t, N>;
    const auto bits = bits_as<U>(pack);
    const U magnitude = bits & 0x7fffffff;
    const U rounded = (magnitude - (112u << 23) + ((magnitude >> 13 & 1) + 0xfff)) >> 13;
    // Below 2^-14, adding 0.5 lines the last kept bit up with the last bit of the float, and the addition rounds.
    const U below = bits_as<U>(static_cast<Pack<float, N>>(bits_as<Pack<float, N>>(magnitude) + 0.5f)) - (126u << 23);
    const U quiet = (magnitude >> 13 & 0x3ff) | 0x7e00;
    const U finite = magnitude < (113u << 23) ? below : rounded;
    const U infinite = magnitude > 0x7f800000 ? quiet : magnitude - magnitude + 0x7c00;
    const U result = (magnitude < (143u << 23) ? finite : infinite) | (bits >> 16 & 0x8000);
    store(to, convert<uint16_t, N>(result));
  }
};

// --- operators on packs; a + b of unsigned lanes wraps, which is what signed integers are to do as well ---

struct Add {
  template <class P>
  static PARACOMM_INLINE P apply(P a, P b) {
    return static_cast<P>(a + b);
  }
};
template <class Op>
constexpr bool is_sum = false;
template <>
constexpr bool is_sum<Add> = true;
struct Multiply {
  template <class P>
  static PARACOMM_INLINE P apply(P a, P b) {
    return a * b;
  }
  // Two of these would be promoted to int, and their product overflows it.
  static PARACOMM_INLINE uint16_t apply(uint16_t a, uint16_t b) { return static_cast<uint16_t>(uint32_t{a} * b); }
  static PARACOMM_INLINE uint8_t apply(uint8_t a, uint8_t b) { return static_cast<uint8_t>(uint32_t{a} * b); }
};
/// a stays where it is a NaN, b comes where it is a NaN.
struct Min {
  template <class P>
  static PARACOMM_INLINE P apply(P a, P b) {
    return (a < b) | (a != a) ? a : b;
  }
};
struct Max {
  template <class P>
  static PARACOMM_INLINE P apply(P a, P b) {
    return (a > b) | (a != a) ? a : b;
  }
};
struct And {
  template <class P>
  static PARACOMM_INLINE P apply(P a, P b) {
    return static_cast<P>(a & b);
  }
};
struct Or {
  template <class P>
  static PARACOMM_INLINE P apply(P a, P b) {
    return static_cast<P>(a | b);
  }
};
struct Xor {
  template <class P>
  static PARACOMM_INLINE P apply(P a, P b) {
    return static_cast<P>(a ^ b);
  }
};

// --- the loop ---

/// kSrcs and kDsts: how many there are, 0 where only the run knows.
template <class E, class Op, bool kAverage, int kSrcs, int kDsts>
struct Loop {
  using T = typename E::Stored;

  void* const* dsts;
  int n_dsts;
  const void* const* srcs;
  int n_srcs;
  int divisor;

  PARACOMM_INLINE int src_count() const { return kSrcs ? kSrcs : n_srcs; }
  PARACOMM_INLINE int dst_count() const { return kDsts ? kDsts : n_dsts; }

  /// kPacks packs of N elements from i on: all sources are read before a destination is written, so that it may be one.
  template <int N, int kPacks>
  PARACOMM_INLINE void block(size_t i) const {
    Pack<typename E::Sum, N> sum[kPacks];
    const T* first = static_cast<const T*>(srcs[0]) + i;
    for (int u = 0; u < kPacks; ++u) sum[u] = E::template get<N>(first + u * N);
    for (int j = 1; j < src_count(); ++j) {
      const T* next = static_cast<const T*>(srcs[j]) + i;
      for (int u = 0; u < kPacks; ++u) sum[u] = Op::apply(sum[u], E::template get<N>(next + u * N));
    }
    if constexpr (kAverage)
      for (int u = 0; u < kPacks; ++u) sum[u] = E::template divide<N>(sum[u], divisor);
    for (int k = 0; k < dst_count(); ++k) {
      T* dst = static_cast<T*>(dsts[k]) + i;
      for (int u = 0; u < kPacks; ++u) E::template put<N>(dst + u * N, sum[u]);
    }
  }

  PARACOMM_INLINE void run(size_t count) const {
    constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(typename E::Sum));
    size_t i = 0;
    for (; i + kLanes * kUnroll <= count; i += kLanes * kUnroll) block<kLanes, kUnroll>(i);
    for (; i + kLanes <= count; i += kLanes) block<kLanes, 1>(i);
    if constexpr (kLanes >= 16)
      if (i + kLanes / 2 <= count) block<kLanes / 2, 1>(i), i += kLanes / 2;
    for (; i < count; ++i) {
      __asm__ volatile(
          "");  // keeps the compiler from vectorising these few, whose set-up would dominate short messages
      block<1, 1>(i);
    }
  }
};

template <class E, class Op, bool kAverage>
void reduce(void* const* dsts, int n_dsts, const void* const* srcs, int n_srcs, size_t count, int divisor) {
  if constexpr (kAverage)
    if (divisor == 1) return reduce<E, Op, false>(dsts, n_dsts, srcs, n_srcs, count, 1);
  if constexpr (is_sum<Op> && !kAverage) {
    if (n_srcs == 2 && n_dsts <= 2) {
      // Local copies of the pointers stay in registers; a store through a dst might change the caller's arrays.
      const void* const two[] = {srcs[0], srcs[1]};
      void* const to[] = {dsts[0], dsts[n_dsts - 1]};
      if (n_dsts == 1) return Loop<E, Op, false, 2, 1>{to, 1, two, 2, 1}.run(count);
      return Loop<E, Op, false, 2, 2>{to, 2, two, 2, 1}.run(count);
    }
  }
  Loop<E, Op, kAverage, 0, 0>{dsts, n_dsts, srcs, n_srcs, divisor}.run(count);
}

// --- the table ---

template <class E>
constexpr void fill_arithmetic(ReduceFn* row) {
  row[static_cast<int>(ReduceOp::sum)] = reduce<E, Add, false>;
  row[static_cast<int>(ReduceOp::prod)] = reduce<E, Multiply, false>;
  row[static_cast<int>(ReduceOp::avg)] = reduce<E, Add, true>;
}

template <class E>
constexpr void fill_order(ReduceFn* row) {
  row[static_cast<int>(ReduceOp::min)] = reduce<E, Min, false>;
  row[static_cast<int>(ReduceOp::max)] = reduce<E, Max, false>;
}

template <class E>
constexpr void fill_bitwise(ReduceFn* row) {
  row[static_cast<int>(ReduceOp::band)] = reduce<E, And, false>;
  row[static_cast<int>(ReduceOp::bor)] = reduce<E, Or, false>;
  row[static_cast<int>(ReduceOp::bxor)] = reduce<E, Xor, false>;
}

template <class E>
constexpr void fill_floating(ReduceFn* row) {
  fill_arithmetic<E>(row);
  fill_order<E>(row);
}

template <class Signed, class Unsigned>
constexpr void fill_integer(ReduceFn* row) {
  fill_arithmetic<Plain<Unsigned, Signed>>(row);
  fill_order<Plain<Signed>>(row);
  fill_bitwise<Plain<Unsigned>>(row);
}

constexpr ReduceTable make_table() {
  ReduceTable table{};
  auto row = [&table](DType dtype) { return table.loops[static_cast<int>(dtype)]; };
  fill_floating<Plain<double>>(row(DType::float64));
  fill_floating<Plain<float>>(row(DType::float32));
  fill_floating<Float16>(row(DType::float16));
  fill_floating<BFloat16>(row(DType::bfloat16));
  fill_integer<int8_t, uint8_t>(row(DType::int8));
  fill_integer<int16_t, uint16_t>(row(DType::int16));
  fill_integer<int32_t, uint32_t>(row(DType::int32));
  fill_integer<int64_t, uint64_t>(row(DType::int64));
  fill_integer<uint8_t, uint8_t>(row(DType::uint8));
  fill_integer<uint16_t, uint16_t>(row(DType::uint16));
  fill_integer<uint32_t, uint32_t>(row(DType::uint32));
  fill_integer<uint64_t, uint64_t>(row(DType::uint64));
  ReduceFn* boolean = row(DType::boolean);
  fill_bitwise<Plain<uint8_t>>(boolean);
  boolean[static_cast<int>(ReduceOp::sum)] = boolean[static_cast<int>(ReduceOp::max)] =
      reduce<Plain<uint8_t>, Or, false>;
  boolean[static_cast<int>(ReduceOp::prod)] = boolean[static_cast<int>(ReduceOp::min)] =
      reduce<Plain<uint8_t>, And, false>;
  return table;
}

#undef PARACOMM_INLINE

}  // namespace
}  // namespace paracomm
