// Element types and reduction operators.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paracomm {

enum class DType : uint8_t {
  float64,
  float32,
  float16,
  bfloat16,
  int8,
  int16,
  int32,
  int64,
  uint8,
  boolean,
  uint16,
  uint32,
  uint64
};
enum class ReduceOp : uint8_t { sum, prod, min, max, avg, band, bor, bxor };

inline constexpr int kDTypes = 13;
inline constexpr int kReduceOps = 8;

/// Bytes of one element.
size_t size_of(DType dtype) noexcept;
/// "float32", "bool", ... as NumPy and torch spell them.
const char* name_of(DType dtype) noexcept;
/// "sum", "avg", ...
const char* name_of(ReduceOp op) noexcept;

}  // namespace paracomm
