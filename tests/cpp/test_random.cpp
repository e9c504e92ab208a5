// The counter-based generator: the paper's known answers, and every path against one counter at a time.
#include "random/random.h"

#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "reduce/reduce.h"

using namespace paracomm;

namespace {

void test_known_answers() {
  struct Case {
    uint32_t counter[4], key[2], expected[4];
  };
  // Random123's kat_vectors, philox 4 x 32 of 10 rounds.
  const Case cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Case& c : cases) {
    uint32_t out[4];
    philox(c.counter, c.key, out);
    for (int i = 0; i < 4; ++i) CHECK_EQ(out[i], c.expected[i]);
  }
}

std::vector<uint32_t> words(const RandomKey& key, uint64_t block) {
  const uint32_t counter[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), key.stream, key.step};
  const uint32_t half[2] = {static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)};
  std::vector<uint32_t> out(4);
  philox(counter, half, out.data());
  return out;
}

constexpr RandomKey kKey{0x0123456789abcdef, 11, 12};

/// Bases at every alignment and across 2^32 blocks and 2^64; offsets in runs of several lengths, and by themselves.
void test_masks() {
  const std::vector<int64_t> bases = {0, 1, 2, 3, (int64_t{1} << 34) - 5, -9, -31, -2600, -10802};
  std::vector<int64_t> offsets;
  for (int64_t length : {1, 3, 4, 64, 255, 257, 1031})
    for (int64_t i = 0; i < length; ++i) offsets.push_back(10 * length + i);
  const uint32_t threshold = 0x40000000;
  std::vector<uint8_t> out(bases.size() * offsets.size() + 64, 7);
  keep_mask(kKey, bases.data(), bases.size(), offsets.data(), offsets.size(), threshold, out.data());
  size_t kept = 0;
  for (size_t i = 0; i < bases.size(); ++i) {
    for (size_t j = 0; j < offsets.size(); ++j) {
      const uint64_t index = static_cast<uint64_t>(bases[i]) + static_cast<uint64_t>(offsets[j]);
      const uint8_t expected = words(kKey, index / 4)[index % 4] >= threshold;
      CHECK_EQ(int{out[i * offsets.size() + j]}, int{expected});
      kept += expected;
    }
  }
  CHECK(kept > 0.7 * bases.size() * offsets.size() && kept < 0.8 * bases.size() * offsets.size());
  for (size_t i = bases.size() * offsets.size(); i < out.size(); ++i) CHECK_EQ(int{out[i]}, 7);
  keep_mask(kKey, bases.data(), bases.size(), offsets.data(), 0, threshold, nullptr);
}

double unit(uint32_t low, uint32_t high) {
  return std::ldexp(static_cast<double>((uint64_t{high} << 32 | low) >> 11) + 0.5, -53);
}

std::vector<double> normals(uint64_t first, size_t count) {
  std::vector<double> out(count + 4, 7.0);
  fill_normal(kKey, first, count, out.data());
  for (size_t i = count; i < out.size(); ++i) CHECK(out[i] == 7.0);
  out.resize(count);
  return out;
}

void test_normals() {
  for (uint64_t first : {uint64_t{0}, uint64_t{1}, (uint64_t{1} << 33) - 7}) {
    for (size_t count : {0, 1, 2, 31, 32, 33, 2000}) {
      const std::vector<double> out = normals(first, count);
      for (size_t i = 0; i < count; ++i) {
        const std::vector<uint32_t> w = words(kKey, (first + i) / 2);
        const double radius = std::sqrt(-2 * std::log(unit(w[0], w[1])));
        const double angle = 2 * 3.14159265358979323846 * unit(w[2], w[3]);
        const double expected = radius * ((first + i) % 2 ? std::sin(angle) : std::cos(angle));
        CHECK(std::fabs(out[i] - expected) <= 1e-14 + 1e-12 * std::fabs(expected));
      }
    }
  }
}

}  // namespace

int main() {
  test_known_answers();
  std::vector<double> first;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    try {
      limit_reduce_isa(name);
    } catch (const Error&) {
      continue;  // this build has no such path
    }
    if (std::string(reduce_isa()) != name) continue;
    test_masks();
    test_normals();
    const std::vector<double> drawn = normals(5, 4001);
    if (first.empty()) first = drawn;
    CHECK(drawn == first);
  }
}
