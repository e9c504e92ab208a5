// Tensors packed into one flat buffer, cast and scaled, in one launch.
#pragma once

#include "cuda/handles.h"
#include "executor/device_executor.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

/// A tensor of a bucket. The kernel works on pieces, which are numbered through all tensors.
struct BucketRow {
  std::byte* data;
  uint64_t count, offset, first_piece;
};

class DeviceBucket final : public Bucket {
 public:
  /// Blocks until the table is on the device, through `stream`.
  DeviceBucket(const std::vector<BucketItem>& items, DType dtype, cudaStream_t stream);

  enum class Direction { pack, unpack };
  /// Throws Error(invalid_argument) where the dtypes do not go together.
  void convert(Direction direction, std::byte* flat, DType flat_dtype, double scale, cudaStream_t stream) const;

 private:
  DeviceMemory rows_;
  int32_t n_rows_ = 0;
  uint64_t pieces_ = 0;
  DType dtype_;
};

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
