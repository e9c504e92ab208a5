#include "random/random.h"

#include <algorithm>
#include <cstring>

#include "random/table.h"
#include "reduce/reduce.h"

namespace paracomm {
namespace {

/// The path that reductions take, so that one switch serves the tests of both.
const RandomTable& table() noexcept {
#if defined(__x86_64__)
  const char* isa = reduce_isa();
  if (std::strcmp(isa, "avx512") == 0) return kAvx512Random;
  if (std::strcmp(isa, "avx2") == 0) return kAvx2Random;
#endif
  return kBaselineRandom;
}

/// out[i] = element first + i, modulo 2^64, of a sequence that `blocks(block, n, values)` gives `per_block` at a time.
template <size_t per_block, class T, class Blocks>
void cut_from_blocks(uint64_t first, size_t count, T* out, Blocks&& blocks) {
  constexpr size_t kBuffered = 64;
  while (count) {
    const size_t skipped = first % per_block;
    const size_t to_last = static_cast<size_t>(~first / per_block + 1);  // blocks before the first one again
    size_t taken;
    if (skipped == 0 && count >= per_block) {
      const size_t n = std::min(count / per_block, to_last);
      taken = n * per_block;
      blocks(first / per_block, n, out);
    } else {
      T buffer[kBuffered * per_block];
      const size_t n = std::min({(skipped + count + per_block - 1) / per_block, kBuffered, to_last});
      taken = std::min(count, n * per_block - skipped);
      blocks(first / per_block, n, buffer);
      std::memcpy(out, buffer + skipped, taken * sizeof(T));
    }
    first += taken;
    out += taken;
    count -= taken;
  }
}

size_t run_length(const int64_t* offsets, size_t n) {
  size_t length = 1;
  while (length < n && static_cast<uint64_t>(offsets[length]) == static_cast<uint64_t>(offsets[0]) + length) ++length;
  return length;
}

}  // namespace

void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) noexcept {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k[2] = {key[0], key[1]};
  for (int round = 0; round < 10; ++round, k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u) {
    const uint64_t p = uint64_t{0xD2511F53u} * c[0], q = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(q >> 32) ^ c[1] ^ k[0];
    c[1] = static_cast<uint32_t>(q);
    c[2] = static_cast<uint32_t>(p >> 32) ^ c[3] ^ k[1];
    c[3] = static_cast<uint32_t>(p);
  }
  std::memcpy(out, c, sizeof c);
}

void keep_mask(const RandomKey& key, const int64_t* bases, size_t n_bases, const int64_t* offsets, size_t n_offsets,
               uint32_t threshold, uint8_t* out) {
  const auto keep = table().keep;
  const auto blocks = [&](uint64_t block, size_t n, uint8_t* bytes) { keep(key, block, n, threshold, bytes); };
  for (size_t begin = 0; begin < n_offsets;) {
    const size_t length = run_length(offsets + begin, n_offsets - begin);
    for (size_t i = 0; i < n_bases; ++i)
      cut_from_blocks<4>(static_cast<uint64_t>(bases[i]) + static_cast<uint64_t>(offsets[begin]), length,
                         out + i * n_offsets + begin, blocks);
    begin += length;
  }
}

void fill_normal(const RandomKey& key, uint64_t first, size_t count, double* out) {
  const auto normal = table().normal;
  cut_from_blocks<2>(first, count, out, [&](uint64_t block, size_t n, double* x) { normal(key, block, n, x); });
}

}  // namespace paracomm
