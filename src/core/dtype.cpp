#include "core/dtype.h"

namespace paracomm {
namespace {

struct DTypeRow {
  const char* name;
  size_t size;
};

constexpr DTypeRow kDTypeTable[kDTypes] = {
    {"float64", 8}, {"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"int8", 1},   {"int16", 2},  {"int32", 4},
    {"int64", 8},   {"uint8", 1},   {"bool", 1},    {"uint16", 2},   {"uint32", 4}, {"uint64", 8},
};
constexpr const char* kOpNames[kReduceOps] = {"sum", "prod", "min", "max", "avg", "band", "bor", "bxor"};

}  // namespace

// A signature that came over a wire may hold any byte, and its description must still be safe to print.
size_t size_of(DType dtype) noexcept {
  const auto i = static_cast<size_t>(dtype);
  return i < kDTypes ? kDTypeTable[i].size : 0;
}

const char* name_of(DType dtype) noexcept {
  const auto i = static_cast<size_t>(dtype);
  return i < kDTypes ? kDTypeTable[i].name : "unknown dtype";
}

const char* name_of(ReduceOp op) noexcept {
  const auto i = static_cast<size_t>(op);
  return i < kReduceOps ? kOpNames[i] : "unknown reduction";
}

}  // namespace paracomm
