// Random numbers as a function of where they are used: counters instead of a state, so that any rank finds the number
// of any element by itself. Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC'11).
//
//   counter | block, low | block, high | stream | step |      key | seed, low | seed, high |      -> four words
//
//   word(index)   = words[index % 4] of block index / 4
//   normal(index) = the cosine (even index) or sine (odd) half of a Box-Muller pair from the words of block index / 2
//
// With stream and step 0 the words are those of Triton's `tl.randint4x(seed, block)`. Nothing but integers, + - * / and
// square roots is used, unfused: every CPU path gives identical bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paracomm {

struct RandomKey {
  uint64_t seed;
  uint32_t stream, step;
};

/// The four words of one counter, as the paper numbers them.
void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) noexcept;

/// out[i * n_offsets + j] = word(bases[i] + offsets[j]) >= threshold, as a byte, sums modulo 2^64. Runs of consecutive
/// offsets are drawn four to a block; an offset by itself costs a block.
void keep_mask(const RandomKey& key, const int64_t* bases, size_t n_bases, const int64_t* offsets, size_t n_offsets,
               uint32_t threshold, uint8_t* out);

/// out[i] = normal(first + i), mean 0 and deviation 1; |normal| < 8.6.
void fill_normal(const RandomKey& key, uint64_t first, size_t count, double* out);

}  // namespace paracomm
