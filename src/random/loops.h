// The generator's loops, once, for whatever instruction set the including file is compiled for (see loops_*.cpp).
// Plain loops over kLanes counters, which the compiler turns into vector instructions; all of internal linkage and
// without standard templates, as in reduce/pack.h.
#pragma once

#include "random/table.h"
#include "reduce/pack.h"

namespace paracomm {
namespace {

constexpr size_t kLanes = 16;

/// One word of kLanes counters.
struct Words {
  uint32_t lane[kLanes];
};

/// The words of the blocks first .. first + kLanes - 1.
PARACOMM_INLINE void draw(const RandomKey& key, uint64_t first, Words& a, Words& b, Words& c, Words& d) {
  for (size_t i = 0; i < kLanes; ++i) {
    a.lane[i] = static_cast<uint32_t>(first + i);
    b.lane[i] = static_cast<uint32_t>((first + i) >> 32);
    c.lane[i] = key.stream;
    d.lane[i] = key.step;
  }
  uint32_t low = static_cast<uint32_t>(key.seed), high = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    for (size_t i = 0; i < kLanes; ++i) {
      const uint64_t p = uint64_t{0xD2511F53u} * a.lane[i], q = uint64_t{0xCD9E8D57u} * c.lane[i];
      a.lane[i] = static_cast<uint32_t>(q >> 32) ^ b.lane[i] ^ low;
      b.lane[i] = static_cast<uint32_t>(q);
      c.lane[i] = static_cast<uint32_t>(p >> 32) ^ d.lane[i] ^ high;
      d.lane[i] = static_cast<uint32_t>(p);
    }
  }
}

void keep_blocks(const RandomKey& key, uint64_t first, size_t blocks, uint32_t threshold, uint8_t* out) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a block's four bytes are the bytes of one word");
  for (size_t done = 0; done < blocks; done += kLanes) {
    Words a, b, c, d;
    draw(key, first + done, a, b, c, d);
    for (size_t i = 0; i < kLanes; ++i)
      a.lane[i] = uint32_t{a.lane[i] >= threshold} | uint32_t{b.lane[i] >= threshold} << 8 |
                  uint32_t{c.lane[i] >= threshold} << 16 | uint32_t{d.lane[i] >= threshold} << 24;
    const size_t left = blocks - done;
    if (left >= kLanes)
      __builtin_memcpy(out + 4 * done, a.lane, sizeof a.lane);
    else
      __builtin_memcpy(out + 4 * done, a.lane, 4 * left);
  }
}

/// log(x) of a normal x > 0: x = m 2^e with m in [sqrt(1/2), sqrt(2)), log(m) = 2 atanh((m - 1) / (m + 1)) by its
/// series.
PARACOMM_INLINE double logarithm(double x) {
  constexpr int64_t kRootHalf = 0x3FE6A09E667F3BCD;
  const int64_t bits = bits_as<int64_t>(x), above = bits - kRootHalf;
  const auto exponent = static_cast<int32_t>(above >> 52);
  const double m = bits_as<double>(bits - (int64_t{exponent} << 52));
  const double s = (m - 1) / (m + 1), z = s * s;
  double sum = 1.0 / 23;
  for (int n = 21; n >= 1; n -= 2) sum = sum * z + 1.0 / n;
  return exponent * 0.693147180559945309417 + 2 * s * sum;
}

/// sine and cosine of a quarter turn times `quarters`, |quarters| <= 1/2, by their series.
PARACOMM_INLINE void sine_cosine(double quarters, double& sine, double& cosine) {
  const double r = quarters * 1.57079632679489661923, z = r * r;
  sine = cosine = 1;
  for (int n = 18; n >= 2; n -= 2) {
    cosine = 1 - z / ((n - 1) * n) * cosine;
    sine = 1 - z / (n * (n + 1)) * sine;
  }
  sine *= r;
}

/// A number in (0, 1] of 53 random bits.
PARACOMM_INLINE double unit(uint32_t low, uint32_t high) {
  const auto bits = static_cast<int64_t>((uint64_t{high} << 32 | low) >> 11);
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

void normal_blocks(const RandomKey& key, uint64_t first, size_t blocks, double* out) {
  for (size_t done = 0; done < blocks; done += kLanes) {
    Words a, b, c, d;
    draw(key, first + done, a, b, c, d);
    double pairs[2 * kLanes];
    for (size_t i = 0; i < kLanes; ++i) {
      const double radius = __builtin_sqrt(-2 * logarithm(unit(a.lane[i], b.lane[i])));
      const double turn = 4 * unit(c.lane[i], d.lane[i]);
      const auto quadrant = static_cast<int32_t>(turn + 0.5);
      double sine, cosine;
      sine_cosine(turn - quadrant, sine, cosine);
      const double x = quadrant & 1 ? -sine : cosine, y = quadrant & 1 ? cosine : sine;
      pairs[2 * i] = quadrant & 2 ? -radius * x : radius * x;
      pairs[2 * i + 1] = quadrant & 2 ? -radius * y : radius * y;
    }
    const size_t left = blocks - done;
    __builtin_memcpy(out + 2 * done, pairs, 2 * sizeof(double) * (left < kLanes ? left : kLanes));
  }
}

constexpr RandomTable make_random() { return {&keep_blocks, &normal_blocks}; }

}  // namespace
}  // namespace paracomm
