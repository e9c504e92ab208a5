#include "core/sha256.h"

#include <sys/random.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "core/fd.h"

namespace paracomm {
namespace {

// Fractional parts of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2).
constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr size_t kBlock = 64;

}  // namespace

void Sha256::compress(const uint8_t* block) noexcept {
  uint32_t w[64];
  for (int t = 0; t < 16; ++t) {
    w[t] = uint32_t{block[4 * t]} << 24 | uint32_t{block[4 * t + 1]} << 16 | uint32_t{block[4 * t + 2]} << 8 |
           uint32_t{block[4 * t + 3]};
  }
  for (int t = 16; t < 64; ++t) {
    const uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
    const uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
    w[t] = w[t - 16] + s0 + w[t - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (int t = 0; t < 64; ++t) {
    const uint32_t t1 =
        h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
    const uint32_t t2 = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const uint32_t added[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state_[i] += added[i];
}

Sha256& Sha256::update(std::span<const uint8_t> bytes) noexcept {
  for (size_t done = 0; done < bytes.size();) {
    const size_t used = nbytes_ % kBlock;
    const size_t n = std::min(kBlock - used, bytes.size() - done);
    std::memcpy(block_.data() + used, bytes.data() + done, n);
    nbytes_ += n;
    done += n;
    if (used + n == kBlock) compress(block_.data());
  }
  return *this;
}

Sha256& Sha256::update(std::string_view text) noexcept {
  return update(std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
}

Digest Sha256::finish() noexcept {
  const uint64_t nbits = nbytes_ * 8;
  const size_t used = nbytes_ % kBlock;
  std::array<uint8_t, kBlock + 8> padding{0x80};
  const size_t zeros_end = used < 56 ? 56 - used : 120 - used;
  for (int i = 0; i < 8; ++i) padding[zeros_end + i] = static_cast<uint8_t>(nbits >> (56 - 8 * i));
  update(std::span(padding.data(), zeros_end + 8));
  Digest digest;
  for (size_t i = 0; i < digest.size(); ++i) digest[i] = static_cast<uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)));
  return digest;
}

Digest hmac_sha256(std::span<const uint8_t> key, std::span<const uint8_t> message) noexcept {
  std::array<uint8_t, kBlock> inner{};
  if (key.size() > kBlock) {
    const Digest short_key = Sha256().update(key).finish();
    std::copy(short_key.begin(), short_key.end(), inner.begin());
  } else {
    std::copy(key.begin(), key.end(), inner.begin());
  }
  std::array<uint8_t, kBlock> outer = inner;
  for (uint8_t& byte : inner) byte ^= 0x36;
  for (uint8_t& byte : outer) byte ^= 0x5c;
  const Digest digest = Sha256().update(inner).update(message).finish();
  return Sha256().update(outer).update(digest).finish();
}

bool constant_time_equal(const Digest& a, const Digest& b) noexcept {
  uint8_t different = 0;
  for (size_t i = 0; i < a.size(); ++i) different = static_cast<uint8_t>(different | (a[i] ^ b[i]));
  return different == 0;
}

void random_bytes(std::span<uint8_t> out) {
  for (size_t done = 0; done < out.size();) {
    const ssize_t n = ::getrandom(out.data() + done, out.size() - done, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw Error(ErrorKind::error, system_message("getrandom", errno));
    done += static_cast<size_t>(n);
  }
}

}  // namespace paracomm
