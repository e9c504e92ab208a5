// Runs plans on a GPU's stream over memory that peers map.
//
// A watcher thread looks after what was launched: it completes Works, explains the report of a kernel that gave up,
// fails the communicator with it, and tells kernels to leave when the communicator has failed for whatever reason.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>

#include "cuda/arguments.h"
#include "cuda/bucket.h"
#include "cuda/card.h"
#include "cuda/handles.h"
#include "cuda/tables.h"
#include "executor/device_executor.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

class StreamExecutor final : public DeviceExecutor, public std::enable_shared_from_this<StreamExecutor> {
 public:
  StreamExecutor(int device, const DeviceOptions& options, DeviceHooks hooks);
  ~StreamExecutor() override { close(); }

  const char* kind() const noexcept override;
  int device() const noexcept override { return device_; }
  std::string publish() override;
  void connect(const std::vector<std::string>& blobs) override;
  size_t window_bytes(const Program& program, const Shape& shape) const override;
  std::shared_ptr<Work> launch(const DeviceJob& job, uintptr_t stream, Work::Finish finish) override;
  void join(const Work& work, uintptr_t stream) override;
  void synchronize(uintptr_t stream) override;
  std::shared_ptr<Bucket> bucket(const std::vector<BucketItem>& items, DType dtype) override;
  void pack(const Bucket& bucket, void* flat, DType flat_dtype, double scale, uintptr_t stream) override;
  void unpack(const Bucket& bucket, const void* flat, DType flat_dtype, double scale, uintptr_t stream) override;
  void close() noexcept override;
  void finish(Work& work, double timeout_s) override;

 private:
  using Clock = std::chrono::steady_clock;

  /// A launch's handle, with the event that other streams wait for.
  struct Launched final : Work {
    using Work::Work;
    Event complete_event;
  };
  struct Pending {
    DeviceJob job;
    std::shared_ptr<Launched> work;
    Clock::time_point tell_at;
  };
  /// A plan's tables on the device.
  struct Uploaded {
    std::shared_ptr<const Plan> plan;
    InterpreterArguments args{};
    bool captured = false;  ///< a graph holds the addresses: they stay until the executor is closed
    DeviceMemory instructions, operands, level_begin, scratch;
  };

  std::byte* reach(int rank, const Card& card);
  Fabric fabric(const Signature& signature, double timeout_s) const;
  Uploaded& upload(const std::shared_ptr<const Plan>& plan);
  void launch_kernel(const DeviceJob& job, bool capturing);
  void launch_plan(const DeviceJob& job, bool capturing);
  bool is_shot(const DeviceJob& job) const;
  void launch_shot_of(const DeviceJob& job);

  void watch();
  /// One look at everything. `looking_` is held.
  void look();
  /// Tells kernels who has closed its communicator: nothing more will come from there.
  void tell_gone();
  std::vector<Pending> take_finished();
  void look_at_report(const std::vector<Pending>& finished);
  void tell_stuck();
  std::exception_ptr outcome(const Pending& pending) const;
  Error explain(const Report& report, const DeviceJob& job) const;
  DeviceJob find_job(uint32_t sequence, const std::vector<Pending>& finished);
  void break_down(const Error& error);
  std::string where(const DeviceJob& job) const;
  bool drain();
  void release(bool idle) noexcept;

  const int device_;
  const DeviceOptions options_;
  const DeviceHooks hooks_;
  const Layout layout_;

  std::optional<Stream> stream_, uploads_;
  std::unique_ptr<MappedHost<Board>> board_;
  DeviceMemory arena_, arenas_, stop_;
  std::vector<void*> opened_;    ///< memory of other processes
  std::optional<Event> before_;  ///< what a launch waits for; launches come one at a time

  std::mutex mutex_;  ///< guards what follows
  std::condition_variable changed_;
  std::deque<Pending> pending_;
  std::unordered_map<const Plan*, Uploaded> uploaded_;
  std::map<uint32_t, DeviceJob> captured_;  ///< by sequence: a graph may run them at any time
  bool connected_ = false, closing_ = false;

  std::mutex looking_;  ///< held while looking; guards what follows
  std::optional<Error> own_failure_;
  uint32_t failed_sequence_ = 0;
  uint64_t told_gone_ = 0;
  Clock::time_point patience_ends_ = Clock::time_point::max();  ///< for kernels to leave, once all have failed
  std::thread watcher_;
};

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
