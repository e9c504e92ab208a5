#include "codec/codec.h"

#include <cstring>
#include <string>

#include "codec/table.h"
#include "core/error.h"
#include "reduce/reduce.h"

namespace paracomm {
namespace {

/// The path that reductions take, so that one switch serves the tests of both.
const CodecTable& table() noexcept {
#if defined(__x86_64__)
  const char* isa = reduce_isa();
  if (std::strcmp(isa, "avx512") == 0) return kAvx512Codec;
  if (std::strcmp(isa, "avx2") == 0) return kAvx2Codec;
#endif
  return kBaselineCodec;
}

}  // namespace

void check_format(const BlockFormat& format) {
  if (format.bits != 8 && format.bits != 4)
    throw Error(ErrorKind::invalid_argument, "blocks of " + std::to_string(format.bits) + " bits, expected 8 or 4");
  if (format.block == 0 || format.block % kBlockStep || format.block > kMaxBlock)
    throw Error(ErrorKind::invalid_argument, "blocks of " + std::to_string(format.block) +
                                                 " elements, expected a multiple of " + std::to_string(kBlockStep) +
                                                 " up to " + std::to_string(kMaxBlock));
}

size_t block_bytes(const BlockFormat& format) { return sizeof(float) + format.block * format.bits / 8; }

void encode_blocks(const BlockFormat& format, const float* x, const float* residual, float divisor, size_t count,
                   size_t blocks, float* residual_out, uint8_t* out) {
  const CodecTable::Encode encode = format.bits == 8 ? table().encode8 : table().encode4;
  const size_t whole = count / format.block, rest = count % format.block, done = whole * format.block;
  encode(x, residual, divisor, format.block, whole, residual_out, out);
  out += whole * block_bytes(format);
  if (rest) {
    float last[kMaxBlock] = {}, kept[kMaxBlock] = {};
    std::memcpy(last, x + done, rest * sizeof *x);
    if (residual) std::memcpy(kept, residual + done, rest * sizeof *residual);
    encode(last, kept, divisor, format.block, 1, kept, out);
    if (residual_out) std::memcpy(residual_out + done, kept, rest * sizeof *residual_out);
    out += block_bytes(format);
  }
  const float nothing[kMaxBlock] = {};
  for (size_t b = whole + (rest != 0); b < blocks; ++b, out += block_bytes(format))
    encode(nothing, nullptr, 1, format.block, 1, nullptr, out);
}

void decode_blocks(const BlockFormat& format, const uint8_t* in, size_t count, bool add, float* out) {
  const CodecTable::Decode decode = format.bits == 8 ? table().decode8 : table().decode4;
  const size_t whole = count / format.block, rest = count % format.block, done = whole * format.block;
  decode(in, format.block, whole, add, out);
  if (rest) {
    float last[kMaxBlock] = {};
    if (add) std::memcpy(last, out + done, rest * sizeof *out);
    decode(in + whole * block_bytes(format), format.block, 1, add, last);
    std::memcpy(out + done, last, rest * sizeof *out);
  }
}

}  // namespace paracomm
