#include "transport/handshake.h"

#include <algorithm>
#include <cstring>

namespace paracomm {
namespace {

constexpr std::string_view kMagic = "paracomm mesh 1\n";
constexpr size_t kClaim = 16;
constexpr size_t kNonce = 32;
constexpr size_t kProof = sizeof(Digest);
constexpr size_t kHello = kMagic.size() + kClaim + kNonce + kProof;
constexpr uint8_t kDone = 'k';

std::array<uint8_t, kClaim> pack(const Claim& claim) {
  std::array<uint8_t, kClaim> out;
  size_t at = 0;
  for (const uint32_t number : {claim.from, claim.to, claim.index, claim.total}) {
    for (int shift = 24; shift >= 0; shift -= 8) out[at++] = static_cast<uint8_t>(number >> shift);
  }
  return out;
}

uint32_t number_at(const uint8_t* in) {
  return uint32_t{in[0]} << 24 | uint32_t{in[1]} << 16 | uint32_t{in[2]} << 8 | uint32_t{in[3]};
}

std::array<uint8_t, kNonce> fresh_nonce() {
  std::array<uint8_t, kNonce> nonce;
  random_bytes(nonce);
  return nonce;
}

std::span<const uint8_t> bytes_of(std::string_view text) {
  return std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size());
}

}  // namespace

Handshake Handshake::connector(const Digest& secret, const Claim& claim) {
  Handshake handshake(true, secret);
  handshake.claim_ = claim;
  const auto magic = bytes_of(kMagic);
  handshake.output_.assign(magic.begin(), magic.end());
  handshake.say(pack(claim));
  handshake.say(fresh_nonce());
  handshake.say_proof("hello");
  handshake.expect(kNonce + kProof);
  return handshake;
}

Handshake Handshake::acceptor(const Digest& secret) {
  Handshake handshake(false, secret);
  handshake.expect(kHello);
  return handshake;
}

void Handshake::feed(std::span<const uint8_t> bytes) {
  if (state_ != State::active) return;
  input_.insert(input_.end(), bytes.begin(), bytes.end());
  if (!connects_ && !knows_claim_) {
    const size_t n = std::min(input_.size(), kMagic.size());
    if (std::memcmp(input_.data(), kMagic.data(), n) != 0) state_ = State::failed;
  }
  if (state_ != State::active || wanted() != 0) return;
  if (!connects_) {
    knows_claim_ ? handle_confirm() : handle_hello();
  } else if (!confirmed_) {
    handle_reply();
  } else {
    state_ = input_[0] == kDone ? State::done : State::failed;
  }
}

void Handshake::handle_hello() {
  const auto rest = std::span<const uint8_t>(input_).subspan(kMagic.size());
  const auto covered = rest.first(kClaim + kNonce);
  said_.assign(covered.begin(), covered.end());
  if (!check_proof("hello", rest.subspan(kClaim + kNonce))) return void(state_ = State::failed);
  claim_ = {number_at(&rest[0]), number_at(&rest[4]), number_at(&rest[8]), number_at(&rest[12])};
  knows_claim_ = true;
  say(fresh_nonce());
  say_proof("reply");
  expect(kProof);
}

void Handshake::handle_reply() {
  const auto all = std::span<const uint8_t>(input_);
  said_.insert(said_.end(), all.begin(), all.begin() + kNonce);
  if (!check_proof("reply", all.subspan(kNonce))) return void(state_ = State::failed);
  confirmed_ = true;
  say_proof("confirm");
  expect(1);
}

void Handshake::handle_confirm() {
  if (!check_proof("confirm", input_)) return void(state_ = State::failed);
  output_.push_back(kDone);
  expect(0);
  state_ = State::done;
}

void Handshake::say(std::span<const uint8_t> bytes) {
  said_.insert(said_.end(), bytes.begin(), bytes.end());
  output_.insert(output_.end(), bytes.begin(), bytes.end());
}

void Handshake::say_proof(std::string_view label) {
  const Digest code = proof(label);
  output_.insert(output_.end(), code.begin(), code.end());
}

bool Handshake::check_proof(std::string_view label, std::span<const uint8_t> given) const {
  Digest code;
  std::copy(given.begin(), given.end(), code.begin());
  return constant_time_equal(code, proof(label));
}

Digest Handshake::proof(std::string_view label) const {
  std::vector<uint8_t> message(label.begin(), label.end());
  message.push_back(0);
  message.insert(message.end(), said_.begin(), said_.end());
  return hmac_sha256(secret_, message);
}

void Handshake::expect(size_t nbytes) {
  input_.clear();
  expected_ = nbytes;
}

}  // namespace paracomm
