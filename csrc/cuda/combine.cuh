// A block moves data: `count` elements from `block.sources`, combined from left to right, to `block.destinations`.
//
// An element is read from all sources by the thread that then writes it, so that a destination may be a source. 16
// bytes at a time where all addresses allow it, else element by element. float16 and bfloat16 accumulate in float32 and
// are rounded once.
#pragma once

#include "cuda/block.cuh"
#include "cuda/elements.cuh"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

/// Vectors of a thread on their way at once: as many as 128 registers hold sums for.
template <class E>
constexpr int kUnroll = sizeof(typename E::Stored) == 1 ? 1 : 2;

/// Sources and destinations, `skip` bytes past those of the block.
struct Lists {
  const Block& block;
  int n_sources, n_destinations;
  size_t skip = 0;

  __device__ __forceinline__ const std::byte* source(int j) const { return block.sources[j] + skip; }
  __device__ __forceinline__ std::byte* destination(int k) const { return block.destinations[k] + skip; }
  __device__ __forceinline__ bool aligned() const {
    uintptr_t all = 0;
    for (int j = 0; j < n_sources; ++j) all |= reinterpret_cast<uintptr_t>(source(j));
    for (int k = 0; k < n_destinations; ++k) all |= reinterpret_cast<uintptr_t>(destination(k));
    return all % 16 == 0;
  }
};

/// One memory into another of the same layout, `skip` bytes past their beginning.
struct Pair {
  static constexpr int n_destinations = 1;
  const std::byte* from;
  std::byte* to;
  size_t skip;

  __device__ __forceinline__ const std::byte* source(int) const { return from + skip; }
  __device__ __forceinline__ std::byte* destination(int) const { return to + skip; }
  __device__ __forceinline__ bool aligned() const {
    return (reinterpret_cast<uintptr_t>(source(0)) | reinterpret_cast<uintptr_t>(destination(0))) % 16 == 0;
  }
};

/// One thread's elements: kVectors vectors, `stride` bytes apart.
template <class E, int kVectors>
struct Vectors {
  typename E::Sum lanes[kVectors][kLanes<E>];

  /// All loads first, so that they are on their way together.
  __device__ __forceinline__ explicit Vectors(const std::byte* from, size_t stride) {
    uint4 values[kVectors];
    PARACOMM_UNROLL
    for (int u = 0; u < kVectors; ++u) values[u] = load16(from + static_cast<size_t>(u) * stride);
    PARACOMM_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      PARACOMM_UNROLL
      for (int i = 0; i < kLanes<E>; ++i) lanes[u][i] = E::get(get_lane<typename E::Stored>(values[u], i));
    }
  }

  template <class Op>
  __device__ __forceinline__ void combine(const Vectors& right) {
    PARACOMM_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      PARACOMM_UNROLL
      for (int i = 0; i < kLanes<E>; ++i) lanes[u][i] = Op::template apply<E>(lanes[u][i], right.lanes[u][i]);
    }
  }

  __device__ __forceinline__ void divide(int divisor) {
    PARACOMM_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      PARACOMM_UNROLL
      for (int i = 0; i < kLanes<E>; ++i) lanes[u][i] = E::divide(lanes[u][i], divisor);
    }
  }

  __device__ __forceinline__ uint4 packed(int u) const {
    uint4 result = {0, 0, 0, 0};
    PARACOMM_UNROLL
    for (int i = 0; i < kLanes<E>; ++i) set_lane<typename E::Stored>(result, i, E::put(lanes[u][i]));
    return result;
  }
};

/// From byte `at` on.
template <class E, class Op, int kVectors>
__device__ __forceinline__ void reduce_vectors(const Lists& lists, size_t at, size_t stride, int divisor) {
  Vectors<E, kVectors> sums(lists.source(0) + at, stride);
  for (int j = 1; j < lists.n_sources; ++j)
    sums.template combine<Op>(Vectors<E, kVectors>(lists.source(j) + at, stride));
  if (divisor != 1) sums.divide(divisor);
  PARACOMM_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    const uint4 result = sums.packed(u);
    for (int k = 0; k < lists.n_destinations; ++k)
      store16(lists.destination(k) + at + static_cast<size_t>(u) * stride, result);
  }
}

template <class E, class Op>
__device__ __forceinline__ void reduce_element(const Lists& lists, size_t i, int divisor) {
  using Stored = typename E::Stored;
  typename E::Sum sum = E::get(reinterpret_cast<const Stored*>(lists.source(0))[i]);
  for (int j = 1; j < lists.n_sources; ++j)
    sum = Op::template apply<E>(sum, E::get(reinterpret_cast<const Stored*>(lists.source(j))[i]));
  const Stored result = E::put(divisor == 1 ? sum : E::divide(sum, divisor));
  for (int k = 0; k < lists.n_destinations; ++k) reinterpret_cast<Stored*>(lists.destination(k))[i] = result;
}

template <class E, class Op>
__device__ __forceinline__ void reduce(const Lists& lists, size_t count, int divisor) {
  const size_t stride = static_cast<size_t>(blockDim.x) * 16;
  size_t done = 0;
  if (lists.aligned()) {
    done = count / kLanes<E> * kLanes<E>;
    const size_t end = done * sizeof(typename E::Stored);
    size_t at = static_cast<size_t>(threadIdx.x) * 16;
    for (; at + (kUnroll<E> - 1) * stride < end; at += kUnroll<E> * stride)
      reduce_vectors<E, Op, kUnroll<E>>(lists, at, stride, divisor);
    for (; at < end; at += stride) reduce_vectors<E, Op, 1>(lists, at, stride, divisor);
  }
  for (size_t i = done + threadIdx.x; i < count; i += blockDim.x) reduce_element<E, Op>(lists, i, divisor);
}

/// bool comes as uint8 with a bitwise operator (see kernels.h).
template <class E>
__device__ __forceinline__ void reduce(const Lists& lists, size_t count, ReduceOp op, int divisor) {
  switch (op) {
    case ReduceOp::prod:
      return reduce<E, Multiply>(lists, count, 1);
    case ReduceOp::min:
      return reduce<E, Min>(lists, count, 1);
    case ReduceOp::max:
      return reduce<E, Max>(lists, count, 1);
    case ReduceOp::band:
      if constexpr (E::kBitwise) return reduce<E, And>(lists, count, 1);
      break;
    case ReduceOp::bor:
      if constexpr (E::kBitwise) return reduce<E, Or>(lists, count, 1);
      break;
    case ReduceOp::bxor:
      if constexpr (E::kBitwise) return reduce<E, Xor>(lists, count, 1);
      break;
    default:
      return reduce<E, Add>(lists, count, divisor);
  }
}

/// One source. `Stored`: what the addresses are multiples of. `Memories`: Lists or Pair.
template <class Stored, class Memories>
__device__ __forceinline__ void copy(const Memories& lists, size_t count) {
  size_t done = 0;
  if (lists.aligned()) {
    constexpr size_t kPer = 16 / sizeof(Stored);
    done = count / kPer * kPer;
    const size_t end = done * sizeof(Stored), stride = static_cast<size_t>(blockDim.x) * 16;
    for (size_t at = static_cast<size_t>(threadIdx.x) * 16; at < end; at += stride) {
      const uint4 value = load16(lists.source(0) + at);
      for (int k = 0; k < lists.n_destinations; ++k) store16(lists.destination(k) + at, value);
    }
  }
  for (size_t i = done + threadIdx.x; i < count; i += blockDim.x) {
    const Stored value = reinterpret_cast<const Stored*>(lists.source(0))[i];
    for (int k = 0; k < lists.n_destinations; ++k) reinterpret_cast<Stored*>(lists.destination(k))[i] = value;
  }
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
