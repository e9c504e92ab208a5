#include "cuda/stream_executor.h"

#include <algorithm>
#include <cstring>

#include "core/deadline.h"
#include "core/nap.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "executor/where.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {
namespace {

using namespace std::chrono_literals;

constexpr auto kWatch = 200us;         // between two looks of the watcher while something is under way
constexpr auto kWatchGraphs = 20ms;    // while only graphs may be
constexpr auto kWaiting = 50us;        // between two looks of a thread that waits
constexpr int kSpins = 100;            // looks of such a thread before it naps
constexpr auto kStuck = 200ms;         // as the host executor: ranks tell each other about a wait of this length,
constexpr auto kStillStuck = 1s;       // and again
constexpr auto kPatience = 2s;         // for kernels to leave, and for peers to read what was sent to them
constexpr size_t kMostUploaded = 512;  // plans on the device, but for those in graphs

uint64_t load(const uint64_t& word) { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); }

Layout layout_of(const DeviceOptions& options, size_t world_size) {
  const auto whole = [](size_t nbytes) { return (nbytes + kSector - 1) / kSector * kSector; };
  if (options.channels < 1 || options.shot_blocks < 1 || options.threads < 1 || options.threads > kMaxThreads)
    throw Error(ErrorKind::invalid_argument,
                "a device has at least one channel, one block and one thread, and at most " +
                    std::to_string(kMaxThreads) + " threads a block");
  if (world_size > static_cast<size_t>(kMaxRanks))
    throw Error(ErrorKind::invalid_argument, std::to_string(world_size) + " ranks on one host's devices, at most " +
                                                 std::to_string(kMaxRanks) + " are possible");
  return {static_cast<int>(world_size), options.channels, options.shot_blocks, whole(options.ring_bytes),
          whole(options.staging_bytes)};
}

uint64_t nanoseconds(double seconds) {
  return seconds >= 0 && seconds < 1e9 ? static_cast<uint64_t>(seconds * 1e9) : ~uint64_t{0};
}

/// A kernel that does not end may still use it.
template <class T>
void keep_for_ever(T&& kept) {
  static std::mutex mutex;
  static auto* const all = new std::vector<T>;
  const std::lock_guard lock(mutex);
  all->push_back(std::move(kept));
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

StreamExecutor::StreamExecutor(int device, const DeviceOptions& options, DeviceHooks hooks)
    : device_(device), options_(options), hooks_(std::move(hooks)), layout_(layout_of(options, hooks_.hosts.size())) {
  const OutsideCapture outside;
  const DeviceScope scope(device_);
  stream_.emplace(true);
  uploads_.emplace(false);
  before_.emplace();
  board_ = std::make_unique<MappedHost<Board>>();
  arena_ = DeviceMemory(layout_.nbytes());
  stop_ = DeviceMemory(2 * sizeof(uint64_t));
  check(cudaMemsetAsync(arena_.data(), 0, layout_.nbytes(), *uploads_), "cudaMemsetAsync");
  check(cudaMemsetAsync(stop_.data(), 0, 2 * sizeof(uint64_t), *uploads_), "cudaMemsetAsync");
  check(cudaStreamSynchronize(*uploads_), "cudaStreamSynchronize");
}

const char* StreamExecutor::kind() const noexcept { return PARACOMM_DEVICE_KIND; }

// --- reaching the peers ---

std::string StreamExecutor::publish() {
  const DeviceScope scope(device_);
  return Card::of(device_, layout_, arena_.data()).text();
}

void StreamExecutor::connect(const std::vector<std::string>& blobs) {
  if (blobs.size() != hooks_.hosts.size())
    throw Error(ErrorKind::invalid_argument,
                std::to_string(blobs.size()) + " device cards for " + std::to_string(hooks_.hosts.size()) + " ranks");
  const OutsideCapture outside;
  const DeviceScope scope(device_);
  std::vector<std::byte*> arenas;
  for (size_t r = 0; r < blobs.size(); ++r) arenas.push_back(reach(static_cast<int>(r), Card::parse(blobs[r])));
  arenas_ = device_copy(arenas, *uploads_);
  const std::lock_guard lock(mutex_);
  if (connected_ || closing_) throw Error(ErrorKind::error, "this device executor was connected before");
  connected_ = true;
  watcher_ = std::thread([this] { watch(); });
}

std::byte* StreamExecutor::reach(int rank, const Card& card) {
  if (rank == hooks_.rank) return arena_.data();
  const auto index = static_cast<size_t>(rank);
  const std::string who = "rank " + std::to_string(rank) + " (" + hooks_.hosts[index] + ")";
  if (hooks_.host_indices[index] != hooks_.host_indices[static_cast<size_t>(hooks_.rank)])
    throw Error(ErrorKind::invalid_argument, who + " is on another host; device memory is mapped on one host only");
  card.check_fits(layout_, who);
  try {
    return card.open(device_, opened_);
  } catch (const Error& error) {
    throw Error(ErrorKind::invalid_argument, "the device memory of " + who + " cannot be reached from device " +
                                                 std::to_string(device_) + ": " + error.what());
  }
}

Fabric StreamExecutor::fabric(const Signature& signature, double timeout_s) const {
  Fabric fabric{layout_,
                {board_->on_device(), stop_.as<uint64_t>(), nanoseconds(timeout_s)},
                arenas_.as<std::byte* const>(),
                {},
                hooks_.rank};
  static_assert(sizeof fabric.signature == sizeof signature);
  std::memcpy(fabric.signature, &signature, sizeof signature);
  return fabric;
}

// --- launching ---

size_t StreamExecutor::window_bytes(const Program& program, const Shape& shape) const {
  return PARACOMM_DEVICE_NAMESPACE::window_bytes(program, shape, layout_, options_.slice_bytes);
}

StreamExecutor::Uploaded& StreamExecutor::upload(const std::shared_ptr<const Plan>& plan) {
  const auto found = uploaded_.find(plan.get());
  if (found != uploaded_.end()) return found->second;
  if (uploaded_.size() >= kMostUploaded && pending_.empty())
    std::erase_if(uploaded_, [](const auto& entry) { return !entry.second.captured; });
  const Tables tables = make_tables(*plan, layout_);
  Uploaded uploaded;
  uploaded.plan = plan;
  uploaded.instructions = device_copy(tables.instructions, *uploads_);
  uploaded.operands = device_copy(tables.operands, *uploads_);
  uploaded.level_begin = device_copy(tables.level_begin, *uploads_);
  const size_t copies = static_cast<size_t>(layout_.channels) * static_cast<size_t>(plan->in_flight());
  if (tables.tile_scratch_bytes > 0) uploaded.scratch = DeviceMemory(copies * tables.tile_scratch_bytes);
  InterpreterArguments& args = uploaded.args;
  args.instructions = uploaded.instructions.as<Instruction>();
  args.operands = uploaded.operands.as<Operand>();
  args.level_begin = uploaded.level_begin.as<int32_t>();
  args.tiles = plan->tiles();
  args.stride = plan->stride();
  args.lag = plan->lag();
  args.levels = plan->levels();
  args.in_flight = plan->in_flight();
  args.grain = static_cast<int32_t>(plan->grain());
  args.tile_scratch_bytes = tables.tile_scratch_bytes;
  args.scratch = uploaded.scratch.data();
  return uploaded_.emplace(plan.get(), std::move(uploaded)).first->second;
}

std::shared_ptr<Work> StreamExecutor::launch(const DeviceJob& job, uintptr_t stream, Work::Finish finish) {
  const std::lock_guard lock(mutex_);
  if (!connected_ || closing_)
    throw Error(ErrorKind::error, where(job) + ": the device executor is " + (closing_ ? "closed" : "not connected"));
  try {
    const OutsideCapture outside;
    const DeviceScope scope(device_);
    const bool capturing = is_capturing(stream_of(stream));
    auto work = std::make_shared<Launched>(shared_from_this(), std::move(finish));
    work->begin();
    before_->record(stream_of(stream));
    before_->hold(*stream_);
    launch_kernel(job, capturing);
    work->complete_event.record(*stream_);
    if (capturing) {
      captured_[job.signature.sequence] = job;
      work->complete();
    } else {
      pending_.push_back({job, work, Clock::now() + kStuck});
    }
    changed_.notify_all();
    return work;
  } catch (const Error& error) {
    // The others take part in this call; without this rank they would wait for it.
    const Error failure(error.kind(), where(job) + ": " + error.what());
    hooks_.fail(failure);
    throw failure;
  }
}

void StreamExecutor::launch_kernel(const DeviceJob& job, bool capturing) {
  if (is_shot(job))
    launch_shot_of(job);
  else
    launch_plan(job, capturing);
}

void StreamExecutor::launch_plan(const DeviceJob& job, bool capturing) {
  Uploaded& uploaded = upload(job.plan);
  uploaded.captured |= capturing;
  InterpreterArguments args = uploaded.args;
  args.fabric = fabric(job.signature, job.timeout_s);
  args.input = static_cast<const std::byte*>(job.input);
  args.output = static_cast<std::byte*>(job.output);
  args.op = device_op(job.dtype, job.op);
  args.divisor = job.divisor;
  const int blocks = std::min(layout_.channels, job.plan->tiles());
  check(launch_interpreter(args, job.dtype, blocks, options_.threads, *stream_), "launch of the interpreter");
}

/// Schedules that one kernel runs without messages, to the same bits, where the data are few.
bool StreamExecutor::is_shot(const DeviceJob& job) const {
  const Program& program = *job.program;
  return program.collective == Collective::all_reduce && program.world_size > 1 &&
         ((program.name == "one_shot" && program.levels == 1) || (program.name == "ordered" && program.levels == 2)) &&
         job.count * size_of(job.dtype) <= layout_.staging_bytes;
}

void StreamExecutor::launch_shot_of(const DeviceJob& job) {
  ShotArguments args{};
  args.fabric = fabric(job.signature, job.timeout_s);
  args.input = static_cast<const std::byte*>(job.input);
  args.output = static_cast<std::byte*>(job.output);
  args.count = job.count;
  args.op = device_op(job.dtype, job.op);
  args.divisor = job.divisor;
  args.two = job.program->name == "ordered";
  // All blocks, however few the elements are: each counts calls, and all have to use the same buffer.
  check(launch_shot(args, job.dtype, layout_.shot_blocks, options_.threads, *stream_),
        "launch of an all-reduce in one kernel");
}

void StreamExecutor::join(const Work& work, uintptr_t stream) {
  const auto* const launched = dynamic_cast<const Launched*>(&work);
  if (launched == nullptr)
    throw Error(ErrorKind::invalid_argument, "this operation did not run on the device; wait() for it");
  const OutsideCapture outside;
  const DeviceScope scope(device_);
  launched->complete_event.hold(stream_of(stream));
}

void StreamExecutor::synchronize(uintptr_t stream) {
  const DeviceScope scope(device_);
  check(cudaStreamSynchronize(stream_of(stream)), "cudaStreamSynchronize");
}

std::shared_ptr<Bucket> StreamExecutor::bucket(const std::vector<BucketItem>& items, DType dtype) {
  const OutsideCapture outside;
  const DeviceScope scope(device_);
  const std::lock_guard lock(mutex_);
  if (closing_) throw Error(ErrorKind::error, "the device executor is closed");
  return std::make_shared<DeviceBucket>(items, dtype, *uploads_);
}

void StreamExecutor::pack(const Bucket& bucket, void* flat, DType flat_dtype, double scale, uintptr_t stream) {
  const DeviceScope scope(device_);
  dynamic_cast<const DeviceBucket&>(bucket).convert(DeviceBucket::Direction::pack, static_cast<std::byte*>(flat),
                                                    flat_dtype, scale, stream_of(stream));
}

void StreamExecutor::unpack(const Bucket& bucket, const void* flat, DType flat_dtype, double scale, uintptr_t stream) {
  const DeviceScope scope(device_);
  auto* const from = const_cast<std::byte*>(static_cast<const std::byte*>(flat));
  dynamic_cast<const DeviceBucket&>(bucket).convert(DeviceBucket::Direction::unpack, from, flat_dtype, scale,
                                                    stream_of(stream));
}

// --- looking after what was launched ---

void StreamExecutor::watch() {
  const OutsideCapture outside;
  std::unique_lock lock(mutex_);
  while (!closing_) {
    if (!pending_.empty())
      changed_.wait_for(lock, kWatch);
    else if (!captured_.empty())
      changed_.wait_for(lock, kWatchGraphs);
    else
      changed_.wait(lock);
    lock.unlock();
    {
      const std::lock_guard looking(looking_);
      look();
    }
    lock.lock();
  }
}

void StreamExecutor::tell_gone() {
  uint64_t gone = 0;
  for (size_t r = 0; r < hooks_.hosts.size(); ++r)
    gone |= static_cast<uint64_t>(hooks_.left[r].load(std::memory_order_acquire)) << r;
  if (gone != told_gone_) __atomic_store_n(&(*board_)->gone, gone, __ATOMIC_RELEASE);
  told_gone_ = gone;
}

void StreamExecutor::look() {
  if (!board_) return;  // closed, and all is complete
  tell_gone();
  if (hooks_.stopped->load(std::memory_order_acquire)) {
    __atomic_store_n(&(*board_)->abort, uint64_t{1}, __ATOMIC_RELEASE);
    if (patience_ends_ == Clock::time_point::max()) patience_ends_ = Clock::now() + kPatience;
  }
  std::optional<Error> broken;
  std::vector<Pending> finished;
  try {
    finished = take_finished();
  } catch (const Error& error) {
    broken = error;
  }
  // A kernel's report is there before the kernel is complete.
  look_at_report(finished);
  if (broken) break_down(*broken);
  for (const Pending& pending : finished) pending.work->complete(outcome(pending));
  tell_stuck();
}

std::vector<StreamExecutor::Pending> StreamExecutor::take_finished() {
  const DeviceScope scope(device_);
  const std::lock_guard lock(mutex_);
  std::vector<Pending> finished;
  const bool given_up = Clock::now() >= patience_ends_;
  while (!pending_.empty() && (given_up || pending_.front().work->complete_event.is_complete())) {
    finished.push_back(std::move(pending_.front()));
    pending_.pop_front();
  }
  return finished;
}

/// The device itself has failed: nothing on it will ever be complete.
void StreamExecutor::break_down(const Error& error) {
  patience_ends_ = Clock::now();
  DeviceJob job;
  {
    const std::lock_guard lock(mutex_);
    if (pending_.empty()) return;
    job = pending_.front().job;
  }
  if (!own_failure_) {
    own_failure_.emplace(error.kind(), where(job) + ": device " + std::to_string(device_) + ": " + error.what());
    failed_sequence_ = job.signature.sequence;
    hooks_.fail(*own_failure_);
  }
}

void StreamExecutor::look_at_report(const std::vector<Pending>& finished) {
  if (own_failure_ || load((*board_)->report.ready) == 0) return;
  const Report report = (*board_)->report;
  failed_sequence_ = static_cast<uint32_t>(report.sequence);
  own_failure_ = explain(report, find_job(failed_sequence_, finished));
  hooks_.fail(*own_failure_);
}

DeviceJob StreamExecutor::find_job(uint32_t sequence, const std::vector<Pending>& finished) {
  for (const Pending& pending : finished)
    if (pending.job.signature.sequence == sequence) return pending.job;
  const std::lock_guard lock(mutex_);
  for (const Pending& pending : pending_)
    if (pending.job.signature.sequence == sequence) return pending.job;
  return captured_.at(sequence);
}

void StreamExecutor::tell_stuck() {
  std::optional<Signature> waiting;
  {
    const std::lock_guard lock(mutex_);
    if (!pending_.empty() && Clock::now() >= pending_.front().tell_at) {
      pending_.front().tell_at = Clock::now() + kStillStuck;
      waiting = pending_.front().job.signature;
    }
  }
  if (waiting) hooks_.stuck(*waiting);
}

/// Null if the call ran to its end.
std::exception_ptr StreamExecutor::outcome(const Pending& pending) const {
  const uint32_t sequence = pending.job.signature.sequence;
  const auto left_at = static_cast<uint32_t>(load((*board_)->left_at));
  const bool left = left_at != 0 && static_cast<int32_t>(sequence - left_at) >= 0;
  if (!left && Clock::now() < patience_ends_) return nullptr;
  if (own_failure_ && sequence == failed_sequence_) return std::make_exception_ptr(*own_failure_);
  return hooks_.failure(where(pending.job));
}

std::string StreamExecutor::where(const DeviceJob& job) const {
  return name_of_call(job.signature, job.program->name, hooks_.rank, hooks_.hosts[static_cast<size_t>(hooks_.rank)]);
}

/// What a kernel gave up with, in words.
Error StreamExecutor::explain(const Report& report, const DeviceJob& job) const {
  std::string text = where(job);
  const auto instruction = static_cast<int32_t>(report.instruction);
  if (instruction >= 0) text += name_of_place(*job.plan, static_cast<size_t>(instruction));
  const auto peer = static_cast<size_t>(report.peer);
  const std::string& host = hooks_.hosts[peer];
  const auto timeout = [&](const char* what) {
    return Error(ErrorKind::timeout, text + ": " + name_of_timeout(what, static_cast<int>(peer), host, job.timeout_s));
  };
  switch (static_cast<Trouble>(report.trouble)) {
    case Trouble::recv_timeout:
      return timeout("recv from");
    case Trouble::send_timeout:
      return timeout("send to");
    case Trouble::stage_timeout:
      return timeout("wait for");
    default:
      break;
  }
  const std::string who = "rank " + std::to_string(peer) + " (" + host + ")";
  if (static_cast<Trouble>(report.trouble) == Trouble::peer_left)
    return Error(ErrorKind::peer_lost, text + ": " + who + " has closed its communicator");
  Signature seen;
  std::memcpy(&seen, report.seen, sizeof seen);
  text += ": " + who + " is in " + describe(seen);
  text += seen == job.signature ? ", message of " + std::to_string(report.seen_bytes) + " bytes, expected " +
                                      std::to_string(report.expected_bytes)
                                : " (" + difference(job.signature, seen) + ")";
  return Error(ErrorKind::mismatch, text);
}

void StreamExecutor::finish(Work& work, double timeout_s) {
  const Deadline deadline = Deadline::after(timeout_s);
  bool failed = false;
  for (int spin = 0; !work.done(); ++spin) {
    {
      const OutsideCapture outside;
      const std::unique_lock looking(looking_, std::try_to_lock);
      if (looking) look();
    }
    if (work.done()) return;
    if (!failed && deadline.expired()) {
      failed = true;
      hooks_.fail(Error(ErrorKind::timeout, "rank " + std::to_string(hooks_.rank) +
                                                ": an operation on the device was not complete " +
                                                std::to_string(timeout_s) + " s after wait() was called"));
    }
    if (spin < kSpins) {
      std::this_thread::yield();
    } else {
      between_naps();
      std::this_thread::sleep_for(kWaiting);
    }
  }
}

// --- the end ---

void StreamExecutor::close() noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (closing_) return;
    closing_ = true;
    changed_.notify_all();
  }
  if (watcher_.joinable()) watcher_.join();
  const std::lock_guard looking(looking_);
  bool idle = false;
  try {
    const OutsideCapture outside;
    const DeviceScope scope(device_);
    idle = !connected_ || drain();
  } catch (const Error&) {
    // The device has failed: nothing of it can be waited for.
  }
  for (const Pending& pending : pending_)
    pending.work->complete(std::make_exception_ptr(Error(
        ErrorKind::error, where(pending.job) + ": the communicator was closed before this operation was complete")));
  pending_.clear();
  release(idle);
}

/// Waits for what is under way, and until peers have read what this rank sent. Returns whether the device has come to
/// rest; where it has not, its memory must stay.
bool StreamExecutor::drain() {
  const auto end = Clock::now() + kPatience;
  const bool failed = hooks_.stopped->load(std::memory_order_acquire);
  Event drained;
  if (!failed)
    check(launch_drain({fabric({}, std::chrono::duration<double>(kPatience).count())}, options_.threads, *stream_),
          "launch of the drain");
  drained.record(*stream_);
  bool aborted = false;
  while (!drained.is_complete()) {
    if (!aborted && (hooks_.stopped->load(std::memory_order_acquire) || Clock::now() >= end)) {
      aborted = true;
      __atomic_store_n(&(*board_)->abort, uint64_t{1}, __ATOMIC_RELEASE);
    }
    if (Clock::now() >= end + kPatience) return false;
    std::this_thread::sleep_for(kWaiting);
  }
  const std::vector<Pending> finished = take_finished();
  for (const Pending& pending : finished) pending.work->complete(outcome(pending));
  return true;
}

void StreamExecutor::release(bool idle) noexcept {
  if (!idle) {
    keep_for_ever(std::move(uploaded_));
    keep_for_ever(std::move(board_));
    keep_for_ever(std::move(arena_));
    keep_for_ever(std::move(arenas_));
    keep_for_ever(std::move(stop_));
    return;
  }
  for (void* memory : opened_) cudaIpcCloseMemHandle(memory);
  opened_.clear();
  uploaded_.clear();
  captured_.clear();
  arenas_ = DeviceMemory();
  arena_ = DeviceMemory();
  stop_ = DeviceMemory();
  board_.reset();
  before_.reset();
  stream_.reset();
  uploads_.reset();
}

// --- the door ---

int device_count(std::string* why) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result == cudaSuccess && count > 0) return count;
  cudaGetLastError();
  if (why == nullptr) return 0;
#if !defined(PARACOMM_EMULATED)
  // Also the answer where there is no driver at all.
  if (result == cudaErrorInsufficientDriver) {
    *why = "no NVIDIA driver that CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
           std::to_string(CUDART_VERSION % 1000 / 10) + " can use";
    return 0;
  }
#endif
  *why = result == cudaSuccess ? "this machine has no GPU" : cudaGetErrorString(result);
  return 0;
}

int device_of(const void* data) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, data), "cudaPointerGetAttributes");
  if (attributes.type == cudaMemoryTypeUnregistered || attributes.type == cudaMemoryTypeHost)
    throw Error(ErrorKind::invalid_argument, "the array's memory is no memory of a " PARACOMM_DEVICE_KIND " device");
  return attributes.device;
}

DeviceOptions default_options() {
  DeviceOptions options;
#if defined(PARACOMM_EMULATED)
  options.channels = 2;
  options.threads = 32;
  options.shot_blocks = 2;
#endif
  return options;
}

std::shared_ptr<DeviceExecutor> make_device_executor(int device, const DeviceOptions& options, DeviceHooks hooks) {
  std::string why;
  const int count = device_count(&why);
  if (device < 0 || device >= count)
    throw Error(ErrorKind::invalid_argument, "there is no " + std::string(PARACOMM_DEVICE_KIND) + " device " +
                                                 std::to_string(device) +
                                                 (count > 0 ? "; there are " + std::to_string(count) : ": " + why));
  return std::make_shared<StreamExecutor>(device, options, std::move(hooks));
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
