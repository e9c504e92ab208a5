// The block codec's loops, once, for whatever instruction set the including file is compiled for (see blocks_*.cpp).
#pragma once

#include "codec/codec.h"
#include "codec/table.h"
#include "reduce/pack.h"

namespace paracomm {
namespace {

constexpr int kLanes = kVectorBytes / 4;
using Floats = Pack<float, kLanes>;
using Ints = Pack<int32_t, kLanes>;
using Bytes = Pack<uint8_t, kLanes>;

constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr float kLeastNormal = 0x1p-126f;
constexpr float kGreatest = 0x1.fffffep127f;
/// Adding 1.5 * 2^23 rounds a small float to an integer, ties to even, and leaves that integer in the low bits.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = 0x4b400000;

/// What the largest magnitude of a block becomes, in units of its scale.
template <int kBits>
constexpr int kTop = kBits == 8 ? 127 : 49;

struct Scale {
  float scale, inverse;
  bool finite;
};

template <int kBits>
PARACOMM_INLINE Scale scale_of(int32_t largest_bits) {
  constexpr float top = kTop<kBits>;
  if (static_cast<uint32_t>(largest_bits) >= kInfinityBits) return {__builtin_nanf(""), 0.0f, false};
  const float largest = bits_as<float>(largest_bits);
  float scale = largest / top;
  if (scale < kLeastNormal) return {0.0f, 0.0f, true};
  // The greatest floats: rounded up, the scale would decode to infinity.
  if (!(scale * top <= kGreatest)) scale = bits_as<float>(bits_as<int32_t>(scale) - 1);
  return {scale, top / largest, true};
}

/// y = (x + residual) / divisor into `y`; returns the bits of the largest magnitude, at least kInfinityBits where one
/// is not finite (as integers, magnitudes order like the floats, and NaN comes last).
PARACOMM_INLINE int32_t prepare(const float* x, const float* residual, float divisor, size_t block, float* y) {
  Ints largest = {};
  for (size_t i = 0; i < block; i += kLanes) {
    Floats value = load<Floats>(x + i);
    if (residual) value += load<Floats>(residual + i);
    value /= divisor;
    store(y + i, value);
    const Ints magnitude = bits_as<Ints>(value) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result = largest[lane] > result ? largest[lane] : result;
  return result;
}

/// The integers of one vector of y, as they are stored; writes what they lose.
template <int kBits>
PARACOMM_INLINE Ints quantise(const float* y, size_t i, const Scale& scale, float divisor, float* residual_out) {
  const Floats value = load<Floats>(y + i), scaled = value * scale.inverse;
  Ints level, whole;  // whole: in units of the scale
  if constexpr (kBits == 8) {
    level = whole = bits_as<Ints>(static_cast<Floats>(scaled + kRounder)) - kRounderBits;
  } else {
    const auto magnitude = bits_as<Floats>(static_cast<Ints>(bits_as<Ints>(scaled) & 0x7fffffff));
    level = Ints{};
    for (int k = 0; k < 7; ++k)  // a comparison that holds is -1
      level -= magnitude > static_cast<float>(k * k + k) + 0.5f;
    const Ints sign = bits_as<Ints>(value) >> 31;
    whole = ((level * level) ^ sign) - sign;
    level = (level ^ sign) - sign;
  }
  if (residual_out)
    store(residual_out + i, static_cast<Floats>((value - convert<float, kLanes>(whole) * scale.scale) * divisor));
  return level;
}

template <int kBits>
void encode(const float* x, const float* residual, float divisor, size_t block, size_t blocks, float* residual_out,
            uint8_t* out) {
  alignas(64) float y[kMaxBlock];
  const size_t half = block / 2;
  for (size_t b = 0; b < blocks; ++b) {
    const Scale scale = scale_of<kBits>(prepare(x, residual, divisor, block, y));
    store(out, scale.scale);
    out += sizeof scale.scale;
    if (!scale.finite) {
      __builtin_memset(out, kBits == 8 ? 0 : 0x88, block * kBits / 8);
      if (residual_out) __builtin_memset(residual_out, 0, block * sizeof *residual_out);
    } else if constexpr (kBits == 8) {
      for (size_t i = 0; i < block; i += kLanes)
        store(out + i, convert<uint8_t, kLanes>(quantise<8>(y, i, scale, divisor, residual_out)));
    } else {
      for (size_t i = 0; i < half; i += kLanes) {
        const Ints low = quantise<4>(y, i, scale, divisor, residual_out) + 8;
        const Ints high = quantise<4>(y, half + i, scale, divisor, residual_out) + 8;
        store(out + i, convert<uint8_t, kLanes>(static_cast<Ints>(low | high << 4)));
      }
    }
    out += block * kBits / 8;
    x += block;
    if (residual) residual += block;
    if (residual_out) residual_out += block;
  }
}

PARACOMM_INLINE void put(float* out, Floats value, bool add) {
  store(out, add ? static_cast<Floats>(load<Floats>(out) + value) : value);
}

/// The value of stored 4 bits, in units of the scale: the square of the level, with its sign.
PARACOMM_INLINE Floats squared(Ints stored) {
  const Ints level = stored - 8, sign = level >> 31;
  return convert<float, kLanes>(static_cast<Ints>(((level * level) ^ sign) - sign));
}

template <int kBits>
void decode(const uint8_t* in, size_t block, size_t blocks, bool add, float* out) {
  const size_t half = block / 2;
  for (size_t b = 0; b < blocks; ++b, out += block) {
    const float scale = load<float>(in);
    in += sizeof scale;
    if constexpr (kBits == 8) {
      for (size_t i = 0; i < block; i += kLanes) {
        const auto q = convert<int32_t, kLanes>(load<Pack<int8_t, kLanes>>(in + i));
        put(out + i, convert<float, kLanes>(q) * scale, add);
      }
    } else {
      for (size_t i = 0; i < half; i += kLanes) {
        const auto both = convert<int32_t, kLanes>(load<Bytes>(in + i));
        put(out + i, squared(both & 15) * scale, add);
        put(out + half + i, squared(both >> 4) * scale, add);
      }
    }
    in += block * kBits / 8;
  }
}

constexpr CodecTable make_codec() { return {encode<8>, encode<4>, decode<8>, decode<4>}; }

}  // namespace
}  // namespace paracomm
