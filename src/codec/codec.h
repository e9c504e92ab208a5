// Gradients in blocks: each block of elements becomes small integers and one scale.
//
//   a block on the wire, 8 bits   | scale float32 | q0 q1 ... q(b-1)                     |   4 + b bytes
//                        4 bits   | scale float32 | q0 + 16 q(b/2), q1 + 16 q(b/2+1) ... |   4 + b/2 bytes
//
// 8 bits: levels q from -127 to 127 stand for q scales, scale = largest magnitude / 127, and an element is off by half
// a scale at most. 4 bits: levels from -7 to 7 (stored plus 8) stand for q |q| scales, scale = largest magnitude / 49:
// few levels are spent better where most elements are, near zero (measured on a GPT's loss; Dettmers' dynamic data
// types have the same reason). An element of level q is off by |q| + 1/2 scales at most, so any by 6.5. Messages are
// whole blocks, so that a message cuts at any block (Dettmers, "8-bit approximations for parallelism in deep learning",
// 2016, quantises in blocks the same way).
//
// A block with an infinity or a NaN decodes to NaN throughout: whoever looks for overflow must see it. A block whose
// largest magnitude is below 127 (8 bits) or 49 (4 bits) times 2^-126 decodes to zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paracomm {

struct BlockFormat {
  int bits;      // 8 or 4
  size_t block;  // elements: a multiple of 32, at most kMaxBlock
};

constexpr size_t kMaxBlock = 1024;
constexpr size_t kBlockStep = 32;

/// Throws Error(invalid_argument) unless the format is one of the above.
void check_format(const BlockFormat& format);

/// Bytes of one block on the wire.
size_t block_bytes(const BlockFormat& format);

/// Writes `blocks` blocks of y = (x + residual) / divisor, zeros from `count` on, and keeps what they lose:
/// residual_out = (y - decoded) * divisor, zeros where the block is not finite. residual and residual_out may be null,
/// and the same; x is only read. No alignment is assumed. count <= blocks * format.block.
void encode_blocks(const BlockFormat& format, const float* x, const float* residual, float divisor, size_t count,
                   size_t blocks, float* residual_out, uint8_t* out);

/// out[i] = decoded[i], or out[i] += decoded[i] where `add`, for i < count.
void decode_blocks(const BlockFormat& format, const uint8_t* in, size_t count, bool add, float* out);

}  // namespace paracomm
