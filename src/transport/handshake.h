// Both ends of a new connection prove that they know the job's secret. Bytes in, bytes out: no sockets here.
//
//   connector                                          acceptor
//   hello   = magic, claim, nonce_c, H("hello")   ->   checks H: knows the secret, or has copied an old hello
//                                                 <-   reply = nonce_a, H("reply")
//   checks H: fresh, knows the secret
//   confirm = H("confirm")                        ->   checks H: fresh, knows the secret
//                                                 <-   done, one byte
//
// H(label) is HMAC-SHA256 under the secret of the label and all that was said before: claim and both nonces. The labels
// differ, so that no answer can be sent back to the one who gave it.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "core/sha256.h"

namespace paracomm {

/// What a connection is for.
struct Claim {
  uint32_t from = 0;   ///< rank of the connector
  uint32_t to = 0;     ///< rank of the acceptor
  uint32_t index = 0;  ///< 0: control, 1..: data
  uint32_t total = 0;  ///< connections that the connector opens between two hosts

  friend bool operator==(const Claim&, const Claim&) = default;
};

class Handshake {
 public:
  enum class State { active, done, failed };

  static Handshake connector(const Digest& secret, const Claim& claim);
  static Handshake acceptor(const Digest& secret);

  State state() const noexcept { return state_; }
  /// The peer sent a hello that only a member of the job can have made; `claim()` is its own.
  bool knows_claim() const noexcept { return knows_claim_; }
  const Claim& claim() const noexcept { return claim_; }

  /// Bytes that the peer must send next: read no more, what follows belongs to somebody else.
  size_t wanted() const noexcept { return expected_ - input_.size(); }
  /// At most `wanted()` bytes from the peer. The state becomes `failed` at the first wrong one that can be told.
  void feed(std::span<const uint8_t> bytes);
  /// Bytes for the peer.
  std::span<const uint8_t> output() const noexcept { return std::span(output_).subspan(sent_); }
  void consume_output(size_t nbytes) noexcept { sent_ += nbytes; }

 private:
  Handshake(bool connects, const Digest& secret) : connects_(connects), secret_(secret) {}

  void say(std::span<const uint8_t> bytes);
  void say_proof(std::string_view label);
  bool check_proof(std::string_view label, std::span<const uint8_t> proof) const;
  Digest proof(std::string_view label) const;
  void expect(size_t nbytes);
  void handle_hello();
  void handle_reply();
  void handle_confirm();

  bool connects_;
  Digest secret_;
  State state_ = State::active;
  bool knows_claim_ = false;
  bool confirmed_ = false;  ///< connector: has sent its confirm
  Claim claim_;
  std::vector<uint8_t> said_;   ///< claim and nonces so far: what the proofs cover
  std::vector<uint8_t> input_;  ///< the message being read
  std::vector<uint8_t> output_;
  size_t sent_ = 0;
  size_t expected_ = 0;
};

}  // namespace paracomm
