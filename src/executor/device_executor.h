// Runs plans on a device: what the communicator and the bindings know of it. The implementations live in csrc/cuda.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/work.h"
#include "schedule/plan.h"

namespace paracomm {

/// Equal on all ranks.
struct DeviceOptions {
  int channels = 8;               ///< blocks of a kernel, which run tiles of their own
  int threads = 512;              ///< of a block
  int shot_blocks = 16;           ///< of a one-shot or two-shot
  size_t ring_bytes = 1 << 20;    ///< of messages on their way, a channel and pair
  size_t slice_bytes = 32 << 10;  ///< the most that a message ought to have
  size_t staging_bytes =
      512 << 10;  ///< the longest one-shot or two-shot; longer ones run as messages, to the same bits
};

/// One collective, ready to run. Pointers are the device's.
struct DeviceJob {
  std::shared_ptr<const Plan> plan;
  std::shared_ptr<const Program> program;
  Signature signature;
  const void* input = nullptr;
  void* output = nullptr;
  DType dtype = DType::uint8;
  ReduceOp op = ReduceOp::sum;
  int divisor = 1;
  size_t count = 0;  ///< elements in all
  double timeout_s = 0;
};

/// What an executor needs of its communicator. The functions may be called from any thread, until close() returns.
struct DeviceHooks {
  int rank = 0;
  std::vector<std::string> hosts;                                         ///< by rank
  std::vector<int> host_indices;                                          ///< by rank
  const std::atomic<bool>* stopped = nullptr;                             ///< the communicator has failed, or is closed
  const std::atomic<bool>* left = nullptr;                                ///< by rank: has closed its communicator
  std::function<void(const Error&)> fail;                                 ///< for all ranks
  std::function<std::exception_ptr(const std::string& context)> failure;  ///< what it failed with
  std::function<void(const Signature&)> stuck;  ///< an operation waits long: the others may be in another one
};

/// Tensors that are packed into one buffer, or unpacked from it: see DeviceExecutor::bucket.
class Bucket {
 public:
  virtual ~Bucket() = default;
};

struct BucketItem {
  void* data = nullptr;
  size_t count = 0;   ///< elements
  size_t offset = 0;  ///< elements from the start of the flat buffer
};

/// A stream is the number of a cudaStream_t. Everything is asynchronous but for what says otherwise.
class DeviceExecutor : public Runner {
 public:
  /// "cuda" or "emulated".
  virtual const char* kind() const noexcept = 0;
  virtual int device() const noexcept = 0;

  /// What the peers need to reach this rank's memory.
  virtual std::string publish() = 0;
  /// Collective: what all ranks published, by rank. Throws Error (invalid_argument where a peer cannot be reached,
  /// mismatch where options differ).
  virtual void connect(const std::vector<std::string>& blobs) = 0;

  /// A Shape's window for this device; equal on all ranks.
  virtual size_t window_bytes(const Program& program, const Shape& shape) const = 0;

  /// Runs the job on the executor's own stream, after what `stream` holds so far. In a stream that is being captured
  /// the job becomes part of the graph, and its Work is complete at once.
  /// `finish`: see Work; the host does it, so it is for devices whose memory is the host's.
  virtual std::shared_ptr<Work> launch(const DeviceJob& job, uintptr_t stream, Work::Finish finish) = 0;
  /// `stream` goes on when `work` is complete. Does not block.
  virtual void join(const Work& work, uintptr_t stream) = 0;
  /// Returns when what `stream` holds so far is complete. Blocks.
  virtual void synchronize(uintptr_t stream) = 0;

  /// The pointers go to the device once; a bucket may then be packed and unpacked often. Blocks.
  virtual std::shared_ptr<Bucket> bucket(const std::vector<BucketItem>& items, DType dtype) = 0;
  /// flat[offset + i] = flat_dtype(item[i] * scale), and back: item[i] = dtype(flat[offset + i] * scale). One launch on
  /// `stream`. Between floating-point types; others are copied, with scale 1 and one dtype.
  virtual void pack(const Bucket& bucket, void* flat, DType flat_dtype, double scale, uintptr_t stream) = 0;
  virtual void unpack(const Bucket& bucket, const void* flat, DType flat_dtype, double scale, uintptr_t stream) = 0;

  /// Waits (briefly) until no peer uses this rank's memory, and frees it. Blocks. Later calls raise.
  virtual void close() noexcept = 0;
};

}  // namespace paracomm
