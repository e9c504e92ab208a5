// Ranks with an emulated device each, and data of any dtype for collectives on them.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "cuda/device.h"
#include "worlds.h"

namespace paracomm_test {

/// Small enough that few bytes make many tiles and wrap around rings.
inline DeviceOptions small_device() {
  DeviceOptions options;
  options.channels = 2;
  options.threads = 32;
  options.shot_blocks = 3;
  options.ring_bytes = 192 << 10;
  options.slice_bytes = 4 << 10;
  options.staging_bytes = 64 << 10;
  return options;
}

/// Threads of one process, with a device each.
class DeviceWorld {
 public:
  explicit DeviceWorld(int n, const DeviceOptions& options = small_device(),
                       const CommOptions& comm_options = small_windows())
      : comms_(Communicator::local(n, comm_options)) {
    std::vector<std::string> cards;
    std::vector<std::shared_ptr<DeviceExecutor>> devices;
    for (int r = 0; r < n; ++r) {
      devices.push_back(emulated::make_device_executor(r, options, comms_[static_cast<size_t>(r)]->device_hooks()));
      cards.push_back(devices.back()->publish());
    }
    for (size_t r = 0; r < devices.size(); ++r) {
      devices[r]->connect(cards);
      comms_[r]->attach_device(devices[r]);
    }
  }
  ~DeviceWorld() {
    run_threads(static_cast<int>(comms_.size()), [&](int rank) { (*this)[rank].close(); });
  }
  DeviceWorld(const DeviceWorld&) = delete;
  DeviceWorld& operator=(const DeviceWorld&) = delete;
  Communicator& operator[](int rank) { return *comms_[static_cast<size_t>(rank)]; }

 private:
  Comms comms_;
};

inline void check_cuda(cudaError_t result) {
  if (result != cudaSuccess) fail(__FILE__, __LINE__, cudaGetErrorString(result));
}

using Bytes = std::vector<std::byte>;

/// Device memory with bytes in it, `shift` bytes past an aligned address.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(const Bytes& bytes, size_t shift = 0) : nbytes_(bytes.size()), shift_(shift) {
    check_cuda(cudaMalloc(&base_, nbytes_ + shift + 16));
    if (nbytes_ > 0) check_cuda(cudaMemcpy(data(), bytes.data(), nbytes_, cudaMemcpyHostToDevice));
  }
  ~DeviceBuffer() { cudaFree(base_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return static_cast<std::byte*>(base_) + shift_; }
  Bytes bytes() const {
    Bytes bytes(nbytes_);
    if (nbytes_ > 0) check_cuda(cudaMemcpy(bytes.data(), data(), nbytes_, cudaMemcpyDeviceToHost));
    return bytes;
  }

 private:
  size_t nbytes_, shift_;
  void* base_ = nullptr;
};

/// A rank's stream, on its device, which becomes the calling thread's.
class DeviceStream {
 public:
  explicit DeviceStream(int device) {
    check_cuda(cudaSetDevice(device));
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~DeviceStream() { cudaStreamDestroy(stream_); }
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;
  operator cudaStream_t() const { return stream_; }
  uintptr_t number() const { return reinterpret_cast<uintptr_t>(stream_); }

 private:
  cudaStream_t stream_ = nullptr;
};

inline bool is_floating(DType dtype) { return dtype <= DType::bfloat16; }

/// Operators that have a meaning for the dtype.
inline std::vector<ReduceOp> ops_of(DType dtype) {
  using enum ReduceOp;
  if (is_floating(dtype)) return {sum, prod, min, max, avg};
  if (dtype == DType::boolean) return {sum, prod, min, max, band, bor, bxor};
  return {sum, prod, min, max, avg, band, bor, bxor};
}

/// Bits of any kind: for floats also subnormal numbers, infinities and NaNs.
inline Bytes random_elements(DType dtype, size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(count * size_of(dtype));
  auto put = [&](size_t i, auto value) { std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value); };
  for (size_t i = 0; i < count; ++i) {
    const uint64_t bits = random();
    // Most numbers near 1, so that sums round; a few of any bits.
    const double number = (static_cast<double>(bits >> 11) * 0x1p-53 - 0.5) * (1 << bits % 7);
    const bool any = bits % 61 == 0;
    const float narrow = static_cast<float>(number);
    uint32_t narrow_bits;
    std::memcpy(&narrow_bits, &narrow, sizeof narrow_bits);
    switch (dtype) {
      case DType::float64:
        any ? put(i, random()) : put(i, number);
        break;
      case DType::float32:
        any ? put(i, static_cast<uint32_t>(random())) : put(i, narrow);
        break;
      case DType::float16:
        // Exponents 0 to 22 of 31: no product of eight overflows often.
        put(i, static_cast<uint16_t>(any ? bits >> 20 : (bits >> 20 & 0x83ff) | (bits >> 40) % 23 << 10));
        break;
      case DType::bfloat16:
        put(i, static_cast<uint16_t>(any ? bits >> 20 : narrow_bits >> 16));
        break;
      case DType::boolean:
        put(i, static_cast<uint8_t>(bits & 1));
        break;
      default:
        std::memcpy(bytes.data() + i * size_of(dtype), &bits, size_of(dtype));
    }
  }
  return bytes;
}

inline bool is_nan(DType dtype, const std::byte* element) {
  uint64_t bits = 0;
  std::memcpy(&bits, element, size_of(dtype));
  switch (dtype) {
    case DType::float64:
      return (bits & ~(1ull << 63)) > 0x7ffull << 52;
    case DType::float32:
      return (bits & 0x7fffffff) > 0x7f800000;
    case DType::float16:
      return (bits & 0x7fff) > 0x7c00;
    case DType::bfloat16:
      return (bits & 0x7fff) > 0x7f80;
    default:
      return false;
  }
}

/// Bit for bit; but which NaN comes of several is nobody's promise.
inline bool same_elements(DType dtype, const Bytes& a, const Bytes& b) {
  if (a.size() != b.size()) return false;
  const size_t size = size_of(dtype);
  for (size_t at = 0; at < a.size(); at += size)
    if (std::memcmp(&a[at], &b[at], size) != 0 && !(is_nan(dtype, &a[at]) && is_nan(dtype, &b[at]))) return false;
  return true;
}

/// One rank's side of a collective.
struct RankData {
  Call call;
  Bytes input, output;
  bool has_input = true, has_output = true, in_place = false;
};

/// `blocks` as for make_sides.
inline RankData make_data(const World& world, int rank, const std::vector<size_t>& blocks, DType dtype, ReduceOp op,
                          bool in_place, uint64_t seed) {
  const Side side = std::move(make_sides(world, blocks, in_place)[static_cast<size_t>(rank)]);
  RankData data;
  data.call = call_of(-1, side, world.by_block());
  data.call.dtype = dtype;
  data.call.op = op;
  data.has_input = side.has_input;
  data.has_output = side.has_output;
  data.in_place = in_place;
  data.input = random_elements(dtype, side.input.size(), seed * 131 + static_cast<uint64_t>(rank));
  data.output.assign(side.output.size() * size_of(dtype), std::byte{0xa5});
  if (in_place) std::copy(data.input.begin(), data.input.end(), data.output.begin());
  return data;
}

/// What the host gives for the same data.
inline Bytes run_on_host(Communicator& comm, int program, RankData data) {
  Call call = data.call;
  call.program = program;
  if (data.has_input) call.input = data.in_place ? data.output.data() : data.input.data();
  if (data.has_output) call.output = data.output.data();
  comm.run(call);
  return data.output;
}

/// `shift`: bytes that buffers lie past an aligned address.
inline Bytes run_on_device(Communicator& comm, int program, const RankData& data, const DeviceStream& stream,
                           size_t shift = 0) {
  const DeviceBuffer input(data.input, shift), output(data.output, shift);
  Call call = data.call;
  call.program = program;
  if (data.has_input) call.input = data.in_place ? output.data() : input.data();
  if (data.has_output) call.output = output.data();
  comm.submit_device(call, stream.number())->wait();
  return output.bytes();
}

}  // namespace paracomm_test
