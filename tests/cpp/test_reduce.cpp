// Every loop on every instruction set, against a scalar reference that shares no code with the loops.
#include "reduce/reduce.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

using namespace paracomm;

namespace {

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

// --- reference: 16-bit floats by arithmetic on their value ---

float value_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 31
                    ? (fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                : exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
                           : std::ldexp(static_cast<float>(fraction), -24);
  return bits >> 15 ? -value : value;
}

float value_of_brain(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

/// Rounds `value` to `fraction_bits` of fraction with exponents from `lowest`, ties to even; overflow goes to infinity.
double round_to(float value, int fraction_bits, int lowest, double largest) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), lowest);
  const double ulp = std::ldexp(1.0, exponent - fraction_bits);
  const double rounded = std::nearbyint(value / ulp) * ulp;
  return std::fabs(rounded) > largest ? std::copysign(INFINITY, value) : rounded;
}

// --- reference: one element of any dtype, held as the type that accumulates ---

struct Float64 {
  using Stored = double;
  using Sum = double;
};
struct Float32 {
  using Stored = float;
  using Sum = float;
};
struct Half {
  using Stored = uint16_t;
  using Sum = float;
};
struct Brain {
  using Stored = uint16_t;
  using Sum = float;
};
struct Boolean {
  using Stored = uint8_t;
  using Sum = bool;
};
template <class T>
struct Integer {
  using Stored = T;
  using Sum = T;
};

template <class E>
typename E::Sum widen(typename E::Stored x) {
  if constexpr (std::is_same_v<E, Half>)
    return value_of_half(x);
  else if constexpr (std::is_same_v<E, Brain>)
    return value_of_brain(x);
  else
    return static_cast<typename E::Sum>(x);
}

template <class T>
T combine(ReduceOp op, T a, T b) {
  if constexpr (std::is_same_v<T, bool>) {
    if (op == ReduceOp::bxor) return a != b;
    return op == ReduceOp::sum || op == ReduceOp::max || op == ReduceOp::bor ? a || b : a && b;
  } else if constexpr (std::is_floating_point_v<T>) {
    if (op == ReduceOp::sum || op == ReduceOp::avg) return a + b;
    if (op == ReduceOp::prod) return a * b;
    if (std::isnan(a)) return a;
    if (std::isnan(b)) return b;
    if (op == ReduceOp::min) return a < b ? a : b;
    return a > b ? a : b;
  } else {
    const uint64_t wide_a = static_cast<uint64_t>(a), wide_b = static_cast<uint64_t>(b);
    switch (op) {
      case ReduceOp::sum:
      case ReduceOp::avg:
        return static_cast<T>(wide_a + wide_b);
      case ReduceOp::prod:
        return static_cast<T>(wide_a * wide_b);
      case ReduceOp::min:
        return a < b ? a : b;
      case ReduceOp::max:
        return a > b ? a : b;
      case ReduceOp::band:
        return static_cast<T>(wide_a & wide_b);
      case ReduceOp::bor:
        return static_cast<T>(wide_a | wide_b);
      default:
        return static_cast<T>(wide_a ^ wide_b);
    }
  }
}

/// Equal bits; for floats, any NaN equals any NaN.
template <class E>
bool same(typename E::Stored actual, typename E::Sum expected) {
  if constexpr (std::is_same_v<E, Half> || std::is_same_v<E, Brain>) {
    constexpr bool half = std::is_same_v<E, Half>;
    const double value = widen<E>(actual);
    const double want = half ? round_to(expected, 10, -14, 65504) : round_to(expected, 7, -126, 0x1.fep127);
    if (std::isnan(want)) return std::isnan(value);
    return value == want && std::signbit(value) == std::signbit(want);
  } else if constexpr (std::is_floating_point_v<typename E::Sum>) {
    return (std::isnan(actual) && std::isnan(expected)) || std::memcmp(&actual, &expected, sizeof actual) == 0;
  } else {
    return actual == static_cast<typename E::Stored>(expected);
  }
}

template <class E>
typename E::Stored random_element(std::mt19937_64& random) {
  using T = typename E::Stored;
  const uint64_t bits = random();
  if constexpr (std::is_same_v<E, Boolean>)
    return bits & 1;
  else if constexpr (std::is_same_v<E, Half> || std::is_same_v<E, Brain>)
    return static_cast<T>(bits);
  else if constexpr (std::is_floating_point_v<T>) {
    const T special[] = {T{0},
                         -T{0},
                         std::numeric_limits<T>::quiet_NaN(),
                         std::numeric_limits<T>::infinity(),
                         -std::numeric_limits<T>::infinity(),
                         std::numeric_limits<T>::denorm_min()};
    if (bits % 16 < 6) return special[bits % 16];
    return static_cast<T>(static_cast<double>(static_cast<int64_t>(random())) * 1e-18);
  } else
    return static_cast<T>(bits);
}

/// Elements at any address: `at(i)` goes through memcpy, and a guard on both sides tells of stray writes.
template <class T>
class Placed {
 public:
  Placed(size_t count, size_t offset)
      : count_(count), offset_(kGuard + offset), bytes_(2 * kGuard + offset + count * sizeof(T), 0x5a) {}
  void* data() { return bytes_.data() + offset_; }
  T get(size_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + offset_ + i * sizeof(T), sizeof(T));
    return value;
  }
  void set(size_t i, T value) { std::memcpy(bytes_.data() + offset_ + i * sizeof(T), &value, sizeof(T)); }
  bool guarded() const {
    for (size_t i = 0; i < offset_; ++i)
      if (bytes_[i] != 0x5a) return false;
    for (size_t i = offset_ + count_ * sizeof(T); i < bytes_.size(); ++i)
      if (bytes_[i] != 0x5a) return false;
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;
  size_t count_, offset_;
  std::vector<unsigned char> bytes_;
};

template <class E>
void check_case(DType dtype, ReduceOp op, int n_srcs, int n_dsts, size_t count, bool in_place,
                std::mt19937_64& random) {
  using T = typename E::Stored;
  const int divisor = op == ReduceOp::avg ? 1 + static_cast<int>(random() % 200) : 1;
  std::vector<Placed<T>> inputs;
  for (int j = 0; j < n_srcs; ++j) {
    inputs.emplace_back(count, sizeof(T) * (random() % 16));
    for (size_t i = 0; i < count; ++i) inputs.back().set(i, random_element<E>(random));
  }
  std::vector<typename E::Sum> expected(count);
  for (size_t i = 0; i < count; ++i) {
    auto sum = widen<E>(inputs[0].get(i));
    for (int j = 1; j < n_srcs; ++j) sum = combine(op, sum, widen<E>(inputs[j].get(i)));
    if constexpr (std::is_floating_point_v<decltype(sum)>)
      sum /= static_cast<decltype(sum)>(divisor);
    else if constexpr (!std::is_same_v<decltype(sum), bool>)
      sum = static_cast<decltype(sum)>(static_cast<int64_t>(sum) / divisor);
    expected[i] = sum;
  }
  const std::vector<Placed<T>> before = inputs;
  std::vector<T> first(count);
  bool have_first = false;
  for (const std::string& path : paths_of_this_cpu()) {
    limit_reduce_isa(path);
    inputs = before;
    std::vector<Placed<T>> outputs;
    for (int k = 0; k < n_dsts; ++k) outputs.emplace_back(count, sizeof(T) * (random() % 16));
    std::vector<const void*> srcs;
    std::vector<void*> dsts;
    for (auto& input : inputs) srcs.push_back(input.data());
    for (auto& output : outputs) dsts.push_back(output.data());
    Placed<T>* last = &outputs[n_dsts - 1];
    if (in_place) dsts[n_dsts - 1] = inputs[n_srcs - 1].data(), last = &inputs[n_srcs - 1];
    select_reduce(dtype, op)(dsts.data(), n_dsts, srcs.data(), n_srcs, count, divisor);
    const std::string where = std::string(name_of(dtype)) + " " + name_of(op) + " on " + path + ", " +
                              std::to_string(n_srcs) + " srcs, " + std::to_string(n_dsts) + " dsts, count " +
                              std::to_string(count);
    for (int k = 0; k < n_dsts; ++k) {
      const Placed<T>& output = k + 1 == n_dsts ? *last : outputs[k];
      for (size_t i = 0; i < count; ++i) {
        const T actual = output.get(i);
        if (!same<E>(actual, expected[i]))
          paracomm_test::fail(__FILE__, __LINE__, where + ": element " + std::to_string(i) + " is not the reference");
        if (!have_first) first[i] = actual;
        if (std::memcmp(&actual, &first[i], sizeof(T)) != 0 && !(actual != actual) &&
            !std::isnan(static_cast<double>(widen<E>(actual))))
          paracomm_test::fail(__FILE__, __LINE__, where + ": element " + std::to_string(i) + " differs between paths");
      }
      CHECK(output.guarded());
      have_first = true;
    }
  }
  limit_reduce_isa("");
}

template <class E>
void check_dtype(DType dtype, bool bitwise, bool averages = true) {
  std::mt19937_64 random(static_cast<uint64_t>(dtype) + 1);
  const size_t counts[] = {0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 33, 63, 65, 100, 127, 259, 517};
  for (int o = 0; o < kReduceOps; ++o) {
    const auto op = static_cast<ReduceOp>(o);
    const bool is_bitwise = op == ReduceOp::band || op == ReduceOp::bor || op == ReduceOp::bxor;
    if ((is_bitwise && !bitwise) || (op == ReduceOp::avg && !averages)) {
      CHECK_THROWS(select_reduce(dtype, op), ErrorKind::invalid_argument, name_of(op));
      continue;
    }
    for (int n_srcs = 1; n_srcs <= 9; ++n_srcs)
      for (int n_dsts = 1; n_dsts <= 3; ++n_dsts)
        for (size_t count : counts) check_case<E>(dtype, op, n_srcs, n_dsts, count, random() % 2, random);
  }
}

/// All 65536 values through one source, and every tie and near-tie of rounding through sums of two.
template <class E>
void check_all_sixteen_bits(DType dtype) {
  std::vector<uint16_t> all(65536), out(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  std::mt19937_64 random(9);
  for (const std::string& path : paths_of_this_cpu()) {
    limit_reduce_isa(path);
    const ReduceFn sum = select_reduce(dtype, ReduceOp::sum);
    for (int round = 0; round < 12; ++round) {
      std::vector<uint16_t> other(all.size());
      for (size_t i = 0; i < other.size(); ++i)
        // Halves, quarters and neighbours of the first operand meet its last bit; the rest is anything.
        other[i] =
            round < 8
                ? static_cast<uint16_t>(i - (1u << (dtype == DType::float16 ? 10 : 7)) * (8 + round) + random() % 4)
                : static_cast<uint16_t>(random());
      const void* srcs[] = {all.data(), other.data()};
      void* dsts[] = {out.data()};
      sum(dsts, 1, srcs, 2, all.size(), 1);
      for (size_t i = 0; i < all.size(); ++i)
        if (!same<E>(out[i], widen<E>(all[i]) + widen<E>(other[i])))
          paracomm_test::fail(__FILE__, __LINE__,
                              std::string(name_of(dtype)) + " on " + path + ": " + std::to_string(all[i]) + " + " +
                                  std::to_string(other[i]) + " gave " + std::to_string(out[i]));
    }
    const void* srcs[] = {all.data()};
    void* dsts[] = {out.data()};
    sum(dsts, 1, srcs, 1, all.size(), 1);
    for (size_t i = 0; i < all.size(); ++i) CHECK(same<E>(out[i], widen<E>(all[i])));
  }
  limit_reduce_isa("");
}

void check_copies() {
  std::mt19937_64 random(4);
  for (size_t nbytes : {0, 1, 7, 64, 65, 127, 200, 1000, 8191, 8192, 8193, 40001})
    for (int n_dsts = 1; n_dsts <= 4; ++n_dsts) {
      Placed<uint8_t> src(nbytes, random() % 70), streamed(nbytes, random() % 70);
      for (size_t i = 0; i < nbytes; ++i) src.set(i, static_cast<uint8_t>(random()));
      const Placed<uint8_t> before = src;
      std::vector<Placed<uint8_t>> outputs;
      std::vector<void*> dsts;
      for (int k = 0; k < n_dsts; ++k) outputs.emplace_back(nbytes, random() % 70);
      for (auto& output : outputs) dsts.push_back(output.data());
      if (n_dsts == 4) dsts[2] = src.data();
      copy_bytes(dsts.data(), n_dsts, src.data(), nbytes);
      stream_bytes(streamed.data(), src.data(), nbytes);
      CHECK(src.guarded() && streamed.guarded());
      for (size_t i = 0; i < nbytes; ++i) CHECK(src.get(i) == before.get(i) && streamed.get(i) == before.get(i));
      for (int k = 0; k < n_dsts; ++k) {
        CHECK(outputs[k].guarded());
        if (n_dsts == 4 && k == 2) continue;
        for (size_t i = 0; i < nbytes; ++i) CHECK_EQ(outputs[k].get(i), before.get(i));
      }
    }
}

void check_limits() {
  CHECK_THROWS(limit_reduce_isa("mmx"), ErrorKind::invalid_argument, "'mmx'");
  limit_reduce_isa("baseline");
  CHECK_EQ(std::string(reduce_isa()), "baseline");
  limit_reduce_isa("");
  CHECK_EQ(std::string(reduce_isa()), std::string(paths_of_this_cpu().back()));
  CHECK_THROWS(select_reduce(static_cast<DType>(99), ReduceOp::sum), ErrorKind::invalid_argument, "unknown dtype");
}

}  // namespace

int main() {
  check_limits();
  check_copies();
  check_all_sixteen_bits<Half>(DType::float16);
  check_all_sixteen_bits<Brain>(DType::bfloat16);
  check_dtype<Float64>(DType::float64, false);
  check_dtype<Float32>(DType::float32, false);
  check_dtype<Half>(DType::float16, false);
  check_dtype<Brain>(DType::bfloat16, false);
  check_dtype<Integer<int8_t>>(DType::int8, true);
  check_dtype<Integer<int16_t>>(DType::int16, true);
  check_dtype<Integer<int32_t>>(DType::int32, true);
  check_dtype<Integer<int64_t>>(DType::int64, true);
  check_dtype<Integer<uint8_t>>(DType::uint8, true);
  check_dtype<Boolean>(DType::boolean, true, false);
  std::printf("paths:");
  for (const std::string& path : paths_of_this_cpu()) std::printf(" %s", path.c_str());
  std::printf("\n");
}
