#include "core/strided.h"

#include <algorithm>
#include <cstring>

namespace paracomm {
namespace {

/// The same elements in as few dimensions as they take; the last one is the innermost.
Strided merged(const Strided& whole) {
  Strided fewer{whole.data, whole.item, {}, {}};
  for (size_t d = 0; d < whole.shape.size(); ++d) {
    if (whole.shape[d] == 1) continue;
    if (!fewer.shape.empty() && fewer.strides.back() == whole.strides[d] * whole.shape[d]) {
      fewer.shape.back() *= whole.shape[d];
      fewer.strides.back() = whole.strides[d];
    } else {
      fewer.shape.push_back(whole.shape[d]);
      fewer.strides.push_back(whole.strides[d]);
    }
  }
  if (fewer.shape.empty()) {
    fewer.shape.push_back(1);
    fewer.strides.push_back(static_cast<int64_t>(whole.item));
  }
  return fewer;
}

template <size_t kItem>
void copy_items(std::byte* to, const std::byte* from, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + static_cast<size_t>(i) * kItem, kItem);
}

void copy_row(std::byte* to, const std::byte* from, int64_t count, int64_t stride, size_t item) {
  if (stride == static_cast<int64_t>(item)) {
    std::memcpy(to, from, static_cast<size_t>(count) * item);
    return;
  }
  switch (item) {
    case 1:
      return copy_items<1>(to, from, count, stride);
    case 2:
      return copy_items<2>(to, from, count, stride);
    case 4:
      return copy_items<4>(to, from, count, stride);
    default:
      return copy_items<8>(to, from, count, stride);
  }
}

}  // namespace

void unpack(const std::byte* packed, const Strided& to, size_t begin, size_t count) {
  if (count == 0) return;
  const Strided a = merged(to);
  const size_t dims = a.shape.size();
  std::vector<int64_t> index(dims);
  auto rest = static_cast<int64_t>(begin);
  for (size_t d = dims; d-- > 0;) {
    index[d] = rest % a.shape[d];
    rest /= a.shape[d];
  }
  for (auto left = static_cast<int64_t>(count); left > 0;) {
    std::byte* row = a.data;
    for (size_t d = 0; d < dims; ++d) row += index[d] * a.strides[d];
    const int64_t n = std::min(left, a.shape.back() - index.back());
    copy_row(row, packed, n, a.strides.back(), a.item);
    packed += static_cast<size_t>(n) * a.item;
    left -= n;
    index.back() = 0;
    for (size_t d = dims - 1; d-- > 0;) {
      if (++index[d] < a.shape[d]) break;
      index[d] = 0;
    }
  }
}

}  // namespace paracomm
