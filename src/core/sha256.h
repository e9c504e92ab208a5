// SHA-256 (FIPS 180-4) and HMAC-SHA256 (RFC 2104): what proves that a connection belongs to the job.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace paracomm {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  Sha256& update(std::span<const uint8_t> bytes) noexcept;
  Sha256& update(std::string_view text) noexcept;
  /// The digest of everything so far; ends the use of this object.
  Digest finish() noexcept;

 private:
  void compress(const uint8_t* block) noexcept;

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> block_{};
  uint64_t nbytes_ = 0;
};

/// The code of `message` under `key`.
Digest hmac_sha256(std::span<const uint8_t> key, std::span<const uint8_t> message) noexcept;

/// Equality in a time that does not tell where two digests differ.
bool constant_time_equal(const Digest& a, const Digest& b) noexcept;

/// Bytes from the kernel's generator. Throws Error(error) if there is none.
void random_bytes(std::span<uint8_t> out);

}  // namespace paracomm
