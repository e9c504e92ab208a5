// Elements that do not lie back to back, and copies into them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace paracomm {

struct Strided {
  std::byte* data = nullptr;
  size_t item = 1;                      ///< bytes of an element
  std::vector<int64_t> shape, strides;  ///< strides in bytes
};

/// Copies `count` elements that lie back to back in `packed` into those of `to` from number `begin` on, in row-major
/// order.
void unpack(const std::byte* packed, const Strided& to, size_t begin, size_t count);

}  // namespace paracomm
