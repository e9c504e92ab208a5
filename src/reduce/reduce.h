// Typed n-ary reduction loops, vectorised, chosen at run time for the CPU.
#pragma once

#include <cstddef>
#include <string>

#include "core/dtype.h"

namespace paracomm {

/// dsts[k][i] = (((srcs[0][i] op srcs[1][i]) op srcs[2][i]) ...) / divisor, for every i < count and every k < n_dsts.
/// Left to right; float16 and bfloat16 accumulate in float32 and round once (to nearest even), when they are stored.
/// n_srcs >= 1, n_dsts >= 1. A dst may be the very same pointer as a src; otherwise they do not overlap. No alignment
/// beyond the element's is assumed. Every CPU path gives identical bits (but for which NaN a sum of two NaNs is).
/// min and max propagate NaN. bool: sum, max, bor are "or", prod, min, band are "and", bxor is "xor". Integers wrap
/// around; their division truncates toward zero. divisor is 1 except for avg.
using ReduceFn = void (*)(void* const* dsts, int n_dsts, const void* const* srcs, int n_srcs, size_t count,
                          int divisor);

/// The loop for `op` on `dtype`. Throws Error(invalid_argument) where the operation has no meaning (bitwise operators
/// on floating point, avg on bool).
ReduceFn select_reduce(DType dtype, ReduceOp op);

/// dsts[k][0:nbytes] = src[0:nbytes]; a dst equal to src is skipped.
void copy_bytes(void* const* dsts, int n_dsts, const void* src, size_t nbytes);

/// dst[0:nbytes] = src[0:nbytes] past the caches, complete before any store that follows. For memory that another core
/// reads next: storing into lines that it still holds ran at 9 GB/s inside one cache complex and at 2.3 across two
/// (windows of 64 KiB, Zen 4), streaming at 22 to 27 in both cases; the reader then gets 15 to 25 instead of 20 to 44
/// and 14 to 18. Pays from about 32 KiB; below 16 KiB copy_bytes is the faster round trip.
void stream_bytes(void* dst, const void* src, size_t nbytes);

/// "avx512", "avx2", "baseline": what select_reduce gives on this CPU.
const char* reduce_isa() noexcept;

/// Restrict to at most this path (tests compare the paths bit for bit); "" lifts the restriction. Throws on unknown
/// names.
void limit_reduce_isa(const std::string& isa);

}  // namespace paracomm
