// Pack and unpack: to[i] = To(From(from[i]) * scale), through float32 (float64 only between two float64), rounded once.
//
// A block takes pieces of kPiece elements in turn and finds a piece's tensor by bisection. 16 bytes at a time where
// both addresses allow it.
#include "cuda/bucket.h"

#include <algorithm>
#include <type_traits>

#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {
namespace {

constexpr uint64_t kPiece = 8192;
constexpr int kBucketThreads = 256;
constexpr uint64_t kMostBlocks = 1024;

struct ConvertArguments {
  const BucketRow* rows;
  int32_t n_rows;
  uint64_t pieces;
  std::byte* flat;
  double scale;
  bool pack;
};

/// Copies bits, whatever they mean.
template <class Bits>
struct Raw {
  using Stored = Bits;
  using Sum = Bits;
  static __device__ __forceinline__ Sum get(Stored bits) { return bits; }
  static __device__ __forceinline__ Stored put(Sum value) { return value; }
};
template <class E>
constexpr bool is_raw = std::is_integral_v<typename E::Sum>;

template <class From, class To>
__device__ __forceinline__ typename To::Stored convert(typename From::Stored bits, double scale) {
  if constexpr (is_raw<From>) {
    return bits;
  } else if constexpr (std::is_same_v<From, Float64> && std::is_same_v<To, Float64>) {
    return To::put(From::get(bits) * scale);
  } else {
    return To::put(static_cast<float>(From::get(bits)) * static_cast<float>(scale));
  }
}

/// As many elements as fill 16 bytes of the narrower type.
template <class From, class To>
struct Vectors {
  using A = typename From::Stored;
  using B = typename To::Stored;
  static constexpr int kCount = 16 / static_cast<int>(sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));
  static constexpr int kIn = kCount * static_cast<int>(sizeof(A)) / 16,
                       kOut = kCount * static_cast<int>(sizeof(B)) / 16;
  static constexpr int kPerIn = kCount / kIn, kPerOut = kCount / kOut;

  static __device__ __forceinline__ void run(const std::byte* from, std::byte* to, double scale) {
    uint4 in[kIn], out[kOut];
    PARACOMM_UNROLL
    for (int v = 0; v < kIn; ++v) in[v] = load16(from + v * 16);
    PARACOMM_UNROLL
    for (int v = 0; v < kOut; ++v) out[v] = {0, 0, 0, 0};
    PARACOMM_UNROLL
    for (int i = 0; i < kCount; ++i)
      set_lane<B>(out[i / kPerOut], i % kPerOut, convert<From, To>(get_lane<A>(in[i / kPerIn], i % kPerIn), scale));
    PARACOMM_UNROLL
    for (int v = 0; v < kOut; ++v) store16(to + v * 16, out[v]);
  }
};

template <class From, class To>
__device__ __forceinline__ void convert_piece(const std::byte* from, std::byte* to, uint64_t count, double scale) {
  using V = Vectors<From, To>;
  using A = typename From::Stored;
  using B = typename To::Stored;
  uint64_t done = 0;
  if ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0) {
    done = count / V::kCount * V::kCount;
    for (uint64_t i = static_cast<uint64_t>(threadIdx.x) * V::kCount; i < done;
         i += static_cast<uint64_t>(blockDim.x) * V::kCount)
      V::run(from + i * sizeof(A), to + i * sizeof(B), scale);
  }
  for (uint64_t i = done + threadIdx.x; i < count; i += blockDim.x)
    reinterpret_cast<B*>(to)[i] = convert<From, To>(reinterpret_cast<const A*>(from)[i], scale);
}

__device__ inline const BucketRow& row_of(const ConvertArguments& args, uint64_t piece) {
  int32_t low = 0, high = args.n_rows;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (args.rows[middle].first_piece <= piece ? low : high) = middle;
  }
  return args.rows[low];
}

template <class From, class To>
__global__ void __launch_bounds__(kBucketThreads) convert_bucket(const __grid_constant__ ConvertArguments args) {
  for (uint64_t piece = blockIdx.x; piece < args.pieces; piece += gridDim.x) {
    const BucketRow row = row_of(args, piece);
    const uint64_t begin = (piece - row.first_piece) * kPiece;
    const uint64_t count = row.count - begin < kPiece ? row.count - begin : kPiece;
    const size_t in_flat = (row.offset + begin), in_row = begin;
    if (args.pack)
      convert_piece<From, To>(row.data + in_row * sizeof(typename From::Stored),
                              args.flat + in_flat * sizeof(typename To::Stored), count, args.scale);
    else
      convert_piece<From, To>(args.flat + in_flat * sizeof(typename From::Stored),
                              row.data + in_row * sizeof(typename To::Stored), count, args.scale);
  }
}

template <class From, class To>
cudaError_t launch_convert(const ConvertArguments& args, cudaStream_t stream) {
  const auto blocks = static_cast<int>(std::min(args.pieces, kMostBlocks));
  return launch(convert_bucket<From, To>, blocks, kBucketThreads, stream, args);
}

cudaError_t launch_copy(const ConvertArguments& args, size_t element_bytes, cudaStream_t stream) {
  switch (element_bytes) {
    case 1:
      return launch_convert<Raw<uint8_t>, Raw<uint8_t>>(args, stream);
    case 2:
      return launch_convert<Raw<uint16_t>, Raw<uint16_t>>(args, stream);
    case 4:
      return launch_convert<Raw<uint32_t>, Raw<uint32_t>>(args, stream);
    default:
      return launch_convert<Raw<uint64_t>, Raw<uint64_t>>(args, stream);
  }
}

}  // namespace

DeviceBucket::DeviceBucket(const std::vector<BucketItem>& items, DType dtype, cudaStream_t stream) : dtype_(dtype) {
  std::vector<BucketRow> rows;
  for (const BucketItem& item : items) {
    if (item.count == 0) continue;
    rows.push_back({static_cast<std::byte*>(item.data), item.count, item.offset, pieces_});
    pieces_ += (item.count + kPiece - 1) / kPiece;
  }
  n_rows_ = static_cast<int32_t>(rows.size());
  rows_ = device_copy(rows, stream);
}

void DeviceBucket::convert(Direction direction, std::byte* flat, DType flat_dtype, double scale,
                           cudaStream_t stream) const {
  const bool cast = is_floating(dtype_) && is_floating(flat_dtype);
  if (!cast && (dtype_ != flat_dtype || scale != 1))
    throw Error(ErrorKind::invalid_argument, std::string("a bucket of ") + name_of(dtype_) + " in a flat buffer of " +
                                                 name_of(flat_dtype) + ", scaled by " + std::to_string(scale) +
                                                 ": only floating-point types are cast and scaled");
  if (pieces_ == 0) return;
  const bool pack = direction == Direction::pack;
  const ConvertArguments args{rows_.as<BucketRow>(), n_rows_, pieces_, flat, scale, pack};
  if (dtype_ == flat_dtype && scale == 1)
    return check(launch_copy(args, size_of(dtype_), stream), "launch of a bucket's copy");
  const DType from = pack ? dtype_ : flat_dtype, to = pack ? flat_dtype : dtype_;
  check(with_floating(from,
                      [&](auto a) {
                        return with_floating(
                            to, [&](auto b) { return launch_convert<decltype(a), decltype(b)>(args, stream); });
                      }),
        "launch of a bucket's conversion");
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
