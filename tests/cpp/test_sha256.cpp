// SHA-256 against FIPS 180-4 examples, HMAC against RFC 4231.
#include "core/sha256.h"

#include <string>
#include <vector>

#include "check.h"

using namespace paracomm;

namespace {

std::string hex(const Digest& digest) {
  std::string out;
  for (const uint8_t byte : digest) {
    out += "0123456789abcdef"[byte >> 4];
    out += "0123456789abcdef"[byte & 15];
  }
  return out;
}

std::string sha(std::string_view text) { return hex(Sha256().update(text).finish()); }

std::string hmac(const std::string& key, const std::string& text) {
  const auto bytes = [](const std::string& s) {
    return std::span(reinterpret_cast<const uint8_t*>(s.data()), s.size());
  };
  return hex(hmac_sha256(bytes(key), bytes(text)));
}

void test_sha256() {
  CHECK_EQ(sha(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK_EQ(sha("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK_EQ(sha("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
           "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK_EQ(sha(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

void test_pieces_make_the_same_digest() {
  const std::string text(300, 'x');
  for (size_t n = 0; n <= text.size(); ++n) {
    Sha256 pieces;
    pieces.update(std::string_view(text).substr(0, n)).update(std::string_view(text).substr(n));
    CHECK_EQ(hex(pieces.finish()), sha(text));
  }
}

void test_hmac() {
  CHECK_EQ(hmac(std::string(20, '\x0b'), "Hi There"),
           "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  CHECK_EQ(hmac("Jefe", "what do ya want for nothing?"),
           "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  CHECK_EQ(hmac(std::string(20, '\xaa'), std::string(50, '\xdd')),
           "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
  CHECK_EQ(hmac(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First"),
           "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

void test_equality_and_random() {
  Digest a{}, b{};
  CHECK(constant_time_equal(a, b));
  for (size_t i = 0; i < a.size(); ++i) {
    b = a;
    b[i] ^= 0x80;
    CHECK(!constant_time_equal(a, b));
  }
  random_bytes(a);
  random_bytes(b);
  CHECK(!constant_time_equal(a, b));
}

}  // namespace

int main() {
  test_sha256();
  test_pieces_make_the_same_digest();
  test_hmac();
  test_equality_and_random();
}
