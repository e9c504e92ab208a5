// The block codec on every instruction set, against a scalar reference that shares no code with it.
#include "codec/codec.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "reduce/reduce.h"

using namespace paracomm;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMax = std::numeric_limits<float>::max();

std::vector<std::string> paths_of_this_cpu() {
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    try {
      limit_reduce_isa(name);
    } catch (const Error&) {
      continue;  // this build has no such path
    }
    if (std::string(reduce_isa()) == name) names.push_back(name);
  }
  limit_reduce_isa("");
  return names;
}

/// A tail of guards behind `count` elements.
template <class T>
struct Guarded {
  explicit Guarded(size_t count) : count(count), values(count + 64, static_cast<T>(77)) {}
  T* data() { return values.data(); }
  bool intact() const {
    for (size_t i = count; i < values.size(); ++i)
      if (values[i] != static_cast<T>(77)) return false;
    return true;
  }
  size_t count;
  std::vector<T> values;
};

int stored_level(const BlockFormat& format, const uint8_t* block, size_t i) {
  const uint8_t* q = block + sizeof(float);
  if (format.bits == 8) return static_cast<int8_t>(q[i]);
  const size_t half = format.block / 2;
  return i < half ? (q[i] & 15) - 8 : (q[i - half] >> 4) - 8;
}

float draw(std::mt19937& random, int kind) {
  const float unit = std::ldexp(static_cast<float>(random() % 2001) - 1000.0f, -10);
  switch (kind) {
    case 0:
      return 0;
    case 1:
      return unit * 1e-3f;
    case 2:
      return std::ldexp(unit, static_cast<int>(random() % 250) - 125);
    case 3:
      return random() % 50 == 0 ? kMax : unit * 1e38f;
    case 4:
      return std::ldexp(unit, -140);  // subnormal
    default:
      return random() % 100 == 0 ? (random() % 2 ? kInf : std::nanf("")) : unit;
  }
}

void check_block(const BlockFormat& format, const std::vector<float>& y, float divisor, const uint8_t* block,
                 const float* decoded, const float* kept) {
  const int levels = format.bits == 8 ? 127 : 7, top = format.bits == 8 ? 127 : 49;
  bool finite = true;
  float largest = 0;
  for (float value : y) finite &= std::isfinite(value), largest = std::fmax(largest, std::fabs(value));
  float scale;
  std::memcpy(&scale, block, sizeof scale);
  for (size_t i = 0; i < y.size(); ++i) {
    if (!finite) {
      CHECK(std::isnan(decoded[i]) && kept[i] == 0);
      continue;
    }
    if (largest < static_cast<float>(top) * 0x1p-126f) {
      CHECK(decoded[i] == 0 && kept[i] == y[i] * divisor);
      continue;
    }
    const int level = stored_level(format, block, i);
    CHECK(std::abs(level) <= levels);
    const int value = format.bits == 8 ? level : level * std::abs(level);
    CHECK(decoded[i] == static_cast<float>(value) * scale && std::isfinite(decoded[i]));
    const double allowed = format.bits == 8 ? 0.5001 : std::min(std::abs(level) + 0.5001, 6.5001);
    CHECK(std::fabs(double{y[i]} - decoded[i]) <= allowed * double{scale});
    CHECK(kept[i] == (y[i] - decoded[i]) * divisor);
  }
}

void check_case(const BlockFormat& format, size_t count, size_t spare, int kind, bool feedback, std::mt19937& random) {
  const size_t blocks = (count + format.block - 1) / format.block + spare;
  std::vector<float> x(count), before(count);
  for (float& value : x) value = draw(random, kind);
  for (float& value : before) value = feedback ? draw(random, kind) * 0.01f : 0;
  const float divisor = feedback ? 3 : 1;
  std::vector<uint8_t> first;
  for (const std::string& path : paths_of_this_cpu()) {
    limit_reduce_isa(path);
    Guarded<uint8_t> message(blocks * block_bytes(format));
    Guarded<float> kept(count), decoded(count);
    std::copy(before.begin(), before.end(), kept.data());
    encode_blocks(format, x.data(), feedback ? kept.data() : nullptr, divisor, count, blocks, kept.data(),
                  message.data());
    decode_blocks(format, message.data(), count, false, decoded.data());
    for (size_t b = 0; b * format.block < count; ++b) {
      std::vector<float> y;
      for (size_t i = b * format.block; i < std::min(count, (b + 1) * format.block); ++i)
        y.push_back((x[i] + before[i]) / divisor);
      check_block(format, y, divisor, message.data() + b * block_bytes(format), decoded.data() + b * format.block,
                  kept.data() + b * format.block);
    }
    // Added to what is there, and blocks beyond the elements are zeros.
    std::vector<float> twice(decoded.data(), decoded.data() + count), all(blocks * format.block, 5.0f);
    decode_blocks(format, message.data(), count, true, twice.data());
    for (size_t i = 0; i < count; ++i) {
      const float sum = decoded.data()[i] + decoded.data()[i];
      CHECK(twice[i] == sum || (std::isnan(sum) && std::isnan(twice[i])));
    }
    decode_blocks(format, message.data(), all.size(), false, all.data());
    for (size_t i = (blocks - spare) * format.block; i < all.size(); ++i) CHECK(all[i] == 0);
    CHECK(message.intact() && kept.intact() && decoded.intact());
    if (first.empty()) first = message.values;
    CHECK(first == message.values);
  }
  limit_reduce_isa("");
}

}  // namespace

int main() {
  std::mt19937 random(3);
  for (int bits : {8, 4})
    for (size_t block : {32, 64, 256, 1024})
      for (size_t count : {0, 1, 31, 32, 33, 64, 255, 257, 1024, 3001})
        for (int kind = 0; kind < 6; ++kind)
          check_case({bits, block}, count, count % 3, kind, (count + kind) % 2 != 0, random);
  for (const BlockFormat& wrong : {BlockFormat{2, 64}, BlockFormat{8, 0}, BlockFormat{8, 48}, BlockFormat{4, 2048}})
    CHECK_THROWS(check_format(wrong), ErrorKind::invalid_argument, "expected");
  CHECK_EQ(block_bytes({8, 256}), size_t{260});
  CHECK_EQ(block_bytes({4, 64}), size_t{36});
}
