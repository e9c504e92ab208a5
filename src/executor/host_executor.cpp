#include "executor/host_executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <thread>

#include "core/error.h"
#include "core/fd.h"
#include "core/nap.h"
#include "executor/where.h"

namespace paracomm {
namespace {

constexpr uint64_t kCopied = ~uint64_t{0};                  // record of a message that left the caller's memory at once
constexpr auto kNap = std::chrono::microseconds(100'000);   // the longest sleep between two looks at the deadline
constexpr auto kBusyNap = std::chrono::microseconds(50);    // while another transport has bytes to move
constexpr auto kStuck = std::chrono::milliseconds(200);     // ranks tell each other about a wait of this length, ...
constexpr auto kFarewell = std::chrono::milliseconds(500);  // last messages may come after the news that a rank left
constexpr auto kStillStuck = std::chrono::seconds(1);       // ... and again

inline void pause_cpu() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr size_t kTimed = 16 << 10;  // bytes from which on it is worth two looks at the clock
constexpr size_t kBlock = 8 << 10;   // stays in the first-level cache
// What a rank that only receives gets, if it is as large as this, leaves the cache before the caller reads it: stored
// past the cache, its lines are not read first. Scatter of 16 MiB over 8 ranks on 2 cores takes 0.9 of the time.
constexpr size_t kPastCache = 1 << 20;
constexpr auto kGoodbye = std::chrono::milliseconds(200);  // for the news that a rank left, after its last bytes
const Instruction kDraining{};                             // for messages about the end of a job

std::string name_of_departure(const char* what, int peer) {
  return std::string(what) + " rank " + std::to_string(peer) + ", which has closed its communicator";
}

}  // namespace

bool Interruption::has_left(int peer) const {
  const auto until = std::chrono::steady_clock::now() + kGoodbye;
  const auto& flag = left[static_cast<size_t>(peer)];
  while (!flag.load(std::memory_order_acquire)) {
    if (stop.load(std::memory_order_acquire) || std::chrono::steady_clock::now() >= until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

HostExecutor::HostExecutor(int rank, std::vector<Endpoint*> endpoints, std::vector<std::string> hosts,
                           Patience patience, const Interruption& interruption)
    : rank_(rank),
      endpoints_(std::move(endpoints)),
      hosts_(std::move(hosts)),
      patience_(patience),
      interruption_(interruption),
      by_reference_(endpoints_.size(), 0) {
  for (Endpoint* endpoint : endpoints_)
    if (endpoint != nullptr && std::find(distinct_.begin(), distinct_.end(), endpoint) == distinct_.end())
      distinct_.push_back(endpoint);
}

HostExecutor::~HostExecutor() {
  if (scratch_ != nullptr) munmap(scratch_, scratch_bytes_);
}

void HostExecutor::grow_scratch(size_t nbytes) {
  if (nbytes <= scratch_bytes_) return;
  if (scratch_ != nullptr) munmap(scratch_, scratch_bytes_);
  scratch_ = nullptr;
  void* p = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    throw Error(ErrorKind::error, system_message("mmap of " + std::to_string(nbytes) + " bytes of scratch", errno));
  scratch_ = static_cast<std::byte*>(p);
  scratch_bytes_ = nbytes;
}

void HostExecutor::run(const Job& job) {
  const Plan& plan = *job.plan;
  for (Endpoint* endpoint : distinct_) endpoint->begin(job.output);
  if (plan.scratch_bytes() > scratch_bytes_) grow_scratch(plan.scratch_bytes());
  const size_t records = static_cast<size_t>(plan.messages()) * static_cast<size_t>(plan.in_flight());
  if (records_.size() < records) records_.resize(records);

  plan.in_order([&](const Instruction& instruction, int32_t tile) { execute(job, instruction, tile); });
  drain(job);
}

std::byte* HostExecutor::address(const Job& job, const Place& place, int32_t size_chunk, int32_t tile) const {
  const size_t offset = job.plan->offset(place, size_chunk, tile);
  switch (place.memory) {
    case Memory::input:
      return const_cast<std::byte*>(job.input) + offset;
    case Memory::output:
      return job.output + offset;
    default:
      return scratch_ + offset;
  }
}

std::byte* HostExecutor::inbox(size_t index, size_t nbytes) {
  if (inboxes_.size() <= index) inboxes_.resize(index + 1);
  if (inboxes_[index].size() < nbytes) inboxes_[index].resize(nbytes);
  return inboxes_[index].data();
}

uint64_t& HostExecutor::record(const Job& job, const Destination& to, int32_t tile) {
  return records_[static_cast<size_t>(to.record) * static_cast<size_t>(job.plan->in_flight()) +
                  static_cast<size_t>(tile % job.plan->in_flight())];
}

void HostExecutor::execute(const Job& job, const Instruction& instruction, int32_t tile) {
  const Plan& plan = *job.plan;
  const size_t nbytes = plan.nbytes(instruction, tile);
  std::byte* const place =
      instruction.has_place ? address(job, instruction.place, instruction.size_chunk, tile) : nullptr;

  for (int32_t earlier : instruction.after_sends) {
    const Instruction& sender = plan.instructions()[static_cast<size_t>(earlier)];
    for (const Destination& to : sender.sends) {
      const uint64_t index = record(job, to, tile);
      if (index != kCopied)
        until(job, instruction, "send to", to.peer, [&] { return endpoints_[to.peer]->sent(to.peer, index); });
    }
  }

  srcs_.clear();
  const bool one_source = instruction.sources.size() == 1;
  for (const Source& source : instruction.sources) {
    if (source.peer < 0) {
      srcs_.push_back(address(job, source.place, instruction.size_chunk, tile));
      continue;
    }
    Endpoint& endpoint = *endpoints_[source.peer];
    std::byte* const into = one_source ? place : inbox(srcs_.size(), nbytes);
    srcs_.push_back(until(job, instruction, "recv from", source.peer,
                          [&] { return endpoint.try_recv(source.peer, job.signature, nbytes, into); }));
  }

  // Where the value goes: this rank's memory, staging that peers read, and peers' outputs that may be written directly.
  bool store = instruction.store;
  dsts_.clear();
  payloads_.clear();
  Endpoint* reserved_by = nullptr;
  std::byte* reserved = nullptr;
  const std::byte* const value = instruction.has_place ? place : static_cast<const std::byte*>(srcs_[0]);
  for (const Destination& to : instruction.sends) {
    Endpoint& endpoint = *endpoints_[to.peer];
    if (to.remote_chunk >= 0) {
      if (std::byte* output = endpoint.peer_output(to.peer)) {
        std::byte* const there = output + plan.offset({Memory::output, to.remote_chunk}, instruction.size_chunk, tile);
        dsts_.push_back(there);
        payloads_.push_back({there, false});
        continue;
      }
    }
    if (!to.copied && endpoint.sends_in_place(value, nbytes)) {
      store |= instruction.has_place;
      payloads_.push_back({value, true});
      continue;
    }
    if (!endpoint.stages()) {
      std::byte* const box = outbox(job, instruction, to, tile, nbytes);
      dsts_.push_back(box);
      payloads_.push_back({box, true});
      continue;
    }
    if (reserved_by != &endpoint) {
      reserved = until(job, instruction, "staging for", to.peer, [&] { return endpoint.try_reserve(nbytes); });
      reserved_by = &endpoint;
      dsts_.push_back(reserved);
    }
    payloads_.push_back({reserved, false});
  }
  if (store) dsts_.push_back(place);

  const bool judged = reserved != nullptr && nbytes >= kTimed;
  const bool stream = judged && reserved_by->streams();
  const bool timed = judged && one_source && !stream;
  const auto start = timed ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point{};
  if (stream) {
    write_streaming(job, instruction, reserved, nbytes);
  } else if (!dsts_.empty() && nbytes > 0) {
    const bool ends_here = one_source && instruction.sources[0].peer >= 0 && plan.messages() == 0 && srcs_[0] != place;
    if (ends_here && nbytes * static_cast<size_t>(plan.tiles()) >= kPastCache)
      stream_bytes(place, srcs_[0], nbytes);
    else if (one_source)
      copy_bytes(dsts_.data(), static_cast<int>(dsts_.size()), srcs_[0], nbytes);
    else
      job.reduce(dsts_.data(), static_cast<int>(dsts_.size()), srcs_.data(), static_cast<int>(srcs_.size()),
                 nbytes / plan.element_bytes(), instruction.final ? job.divisor : 1);
  }

  if (timed) reserved_by->staged(nbytes, std::chrono::steady_clock::now() - start);

  for (const Source& source : instruction.sources)
    if (source.peer >= 0) endpoints_[source.peer]->release(source.peer);

  for (size_t i = 0; i < instruction.sends.size(); ++i) {
    const Destination& to = instruction.sends[i];
    Endpoint& endpoint = *endpoints_[to.peer];
    uint64_t index = 0;
    const auto [data, by_reference] = payloads_[i];
    until(job, instruction, "send to", to.peer,
          [&] { return endpoint.try_send(to.peer, job.signature, data, nbytes, index); });
    record(job, to, tile) = by_reference ? index : kCopied;
    if (by_reference) by_reference_[static_cast<size_t>(to.peer)] = index + 1;
  }
}

/// The value block by block: into the cache first, from there past it into `reserved`.
void HostExecutor::write_streaming(const Job& job, const Instruction& instruction, std::byte* reserved, size_t nbytes) {
  const size_t element = job.plan->element_bytes();
  std::erase(dsts_, reserved);
  alignas(64) std::byte block[kBlock];
  for (size_t at = 0; at < nbytes; at += kBlock) {
    const size_t n = std::min(kBlock, nbytes - at);
    for (void*& dst : dsts_) dst = static_cast<std::byte*>(dst) + (at > 0 ? kBlock : 0);
    for (const void*& src : srcs_) src = static_cast<const std::byte*>(src) + (at > 0 ? kBlock : 0);
    const void* value = srcs_[0];
    if (srcs_.size() > 1) {
      const bool bare = dsts_.empty();
      if (bare) dsts_.push_back(block);
      job.reduce(dsts_.data(), static_cast<int>(dsts_.size()), srcs_.data(), static_cast<int>(srcs_.size()),
                 n / element, instruction.final ? job.divisor : 1);
      value = dsts_[0];
      stream_bytes(reserved + at, value, n);
      if (bare) dsts_.clear();
    } else {
      if (!dsts_.empty()) copy_bytes(dsts_.data(), static_cast<int>(dsts_.size()), value, n);
      stream_bytes(reserved + at, value, n);
    }
  }
}

/// Memory of ours for a message on a transport without staging; the one before it in the same place has left.
std::byte* HostExecutor::outbox(const Job& job, const Instruction& instruction, const Destination& to, int32_t tile,
                                size_t nbytes) {
  const size_t index = static_cast<size_t>(to.record) * static_cast<size_t>(job.plan->in_flight()) +
                       static_cast<size_t>(tile % job.plan->in_flight());
  if (outboxes_.size() <= index) outboxes_.resize(index + 1);
  if (tile >= job.plan->in_flight()) {
    const uint64_t before = records_[index];
    until(job, instruction, "send to", to.peer, [&] { return endpoints_[to.peer]->sent(to.peer, before); });
  }
  if (outboxes_[index].size() < nbytes) outboxes_[index].resize(nbytes);
  return outboxes_[index].data();
}

/// The caller gets its memory back when no message needs it any more.
void HostExecutor::drain(const Job& job) {
  for (size_t peer = 0; peer < by_reference_.size(); ++peer) {
    if (by_reference_[peer] == 0) continue;
    const uint64_t last = by_reference_[peer] - 1;
    by_reference_[peer] = 0;
    until(job, kDraining, "send to", static_cast<int>(peer),
          [&] { return endpoints_[peer]->sent(static_cast<int>(peer), last); });
  }
}

template <class Attempt>
std::invoke_result_t<Attempt&> HostExecutor::until(const Job& job, const Instruction& instruction, const char* what,
                                                   int peer, Attempt attempt) {
  try {
    if (auto result = attempt()) [[likely]]
      return result;
    return wait_until(job, instruction, what, peer, attempt);
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::timeout) throw;
    const bool left = error.kind() == ErrorKind::peer_lost && interruption_.has_left(peer);
    throw Error(error.kind(), where(job, instruction) + ": " + (left ? name_of_departure(what, peer) : error.what()));
  }
}

template <class Attempt>
std::invoke_result_t<Attempt&> HostExecutor::wait_until(const Job& job, const Instruction& instruction,
                                                        const char* what, int peer, Attempt attempt) {
  // Short waits are not worth a look at the clock, which takes as long as a message does.
  for (int look = 0; look < patience_.spins; ++look) {
    pause_cpu();
    if (auto result = attempt()) return result;
  }
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  auto tell = start + kStuck, farewell = Clock::time_point::max();
  Endpoint& endpoint = *endpoints_[static_cast<size_t>(peer)];
  auto done = [&](auto result) {
    waited_ns_.fetch_add(static_cast<uint64_t>((Clock::now() - start) / std::chrono::nanoseconds(1)),
                         std::memory_order_relaxed);
    return result;
  };
  auto progress = [&] {
    bool queued = false;
    for (Endpoint* other : distinct_) queued |= other->progress();
    return queued;
  };
  for (int64_t look = 1;; ++look) {
    const bool left = interruption_.left[static_cast<size_t>(peer)].load(std::memory_order_acquire);
    if (auto result = attempt()) return done(result);
    if (interruption_.stop.load(std::memory_order_acquire)) throw Interrupted{};
    if (look < patience_.looks) {
      if (look % patience_.yield_every != 0) {
        pause_cpu();
      } else {
        progress();
        endpoint.yield(peer);
      }
    } else {
      if (left && farewell == Clock::time_point::max()) farewell = Clock::now() + kFarewell;
      if (Clock::now() >= farewell) throw Error(ErrorKind::peer_lost, name_of_departure(what, peer));
      between_naps();
      if (const auto now = Clock::now(); now >= tell) {
        tell = now + kStillStuck;
        interruption_.stuck(job.signature);
      }
      const bool queued = progress();
      const auto remaining = job.deadline.remaining();
      if (remaining.count() == 0)
        throw Error(ErrorKind::timeout,
                    where(job, instruction) + ": " +
                        name_of_timeout(what, peer, hosts_[static_cast<size_t>(peer)], job.timeout_s));
      const bool others = queued && distinct_.size() > 1;
      endpoint.wait(peer, std::min(remaining, others ? kBusyNap : kNap));
    }
  }
}

std::string HostExecutor::where(const Job& job, const Instruction& instruction) const {
  const std::string call = name_of_call(job.signature, job.program->name, rank_, hosts_[static_cast<size_t>(rank_)]);
  if (&instruction == &kDraining) return call;
  return call + name_of_place(*job.plan, static_cast<size_t>(&instruction - job.plan->instructions().data()));
}

}  // namespace paracomm
