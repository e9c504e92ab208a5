// One pair of kernels for each instruction set; codec.cpp chooses among them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paracomm {

/// Whole blocks of 8 and of 4 bits. encode: see encode_blocks, with divisor and residuals as there.
struct CodecTable {
  using Encode = void (*)(const float* x, const float* residual, float divisor, size_t block, size_t blocks,
                          float* residual_out, uint8_t* out);
  using Decode = void (*)(const uint8_t* in, size_t block, size_t blocks, bool add, float* out);
  Encode encode8, encode4;
  Decode decode8, decode4;
};

extern const CodecTable kBaselineCodec;
#if defined(__x86_64__)
extern const CodecTable kAvx2Codec;
extern const CodecTable kAvx512Codec;
#endif

}  // namespace paracomm
