#include "transport/memory.h"

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "core/error.h"
#include "core/limits.h"

namespace paracomm {

inline constexpr size_t kInline = 32;
inline constexpr size_t kSpacing = 128;  // two lines: the prefetcher fetches pairs

// Where a message's bytes are; kInlined + n: n bytes in the slot itself.
enum Kind : uint32_t { kStaged, kReference, kWritten, kInlined };

struct alignas(64) MemorySlot {
  std::atomic<uint32_t> tag;  // message number + 1 (low 32 bits) once the rest is there
  uint32_t kind;
  Signature signature;
  union {
    std::byte payload[kInline];
    struct {
      uint64_t nbytes, data, output;
    } far;
  };
};
static_assert(sizeof(MemorySlot) == 64);

struct alignas(kSpacing) MemoryHeader {
  std::atomic<uint32_t> doorbell;
  std::atomic<uint32_t> sleeping;
  uint32_t asymmetric;                        // the owner orders its sleeping flag before its last look by membarrier
  alignas(64) std::atomic<uint64_t> yielded;  // count * 2^32 + core
};
struct alignas(kSpacing) MemoryCounter {
  std::atomic<uint64_t> value;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

namespace {

// Staging is judged by the fastest of a few long messages, so that being preempted does not count.
constexpr size_t kLong = 16 << 10;
constexpr int kPaces = 6;
constexpr uint64_t kProbeEvery = 24;
constexpr double kSlowPace = 3.0;  // bytes per nanosecond: 2.5 where caches are apart; elsewhere 4 and more, even into
                                   // lines that were just streamed

constexpr auto kSettle = std::chrono::milliseconds(10);
constexpr uint32_t kYieldsPerLook = 16;

constexpr uint64_t kNowhere = ~uint64_t{0};

/// Our stores before are visible to others before our loads after.
void full_fence() noexcept {
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
  asm volatile("lock; addl $0, -64(%%rsp)" ::: "memory", "cc");
#elif defined(__SANITIZE_THREAD__)
  static std::atomic<int> dummy;
  dummy.fetch_add(1, std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

bool register_membarrier() noexcept {
  static const bool ok = syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0;
  return ok;
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t value, std::chrono::microseconds at_most) noexcept {
  const timespec limit{static_cast<time_t>(at_most.count() / 1'000'000),
                       static_cast<long>(at_most.count() % 1'000'000 * 1000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &limit, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>& word) noexcept {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

size_t line_up(size_t nbytes) noexcept { return (nbytes + 63) / 64 * 64; }

}  // namespace

size_t Segment::bytes(int local_ranks, const MemoryOptions& options) noexcept {
  const auto n = static_cast<size_t>(local_ranks);
  return sizeof(MemoryHeader) + n * (sizeof(MemoryCounter) + kQueueDepth * sizeof(MemorySlot)) + options.staging_bytes;
}

Segment::Segment(int local_ranks, const MemoryOptions& options, bool shared) : local_ranks_(local_ranks) {
  const size_t size = bytes(local_ranks, options);
  if (shared) {
    mapping_ = std::make_unique<Mapping>(make_memfd("paracomm-segment", size));
    data_ = mapping_->data();
    // Faults now, not within the first collectives. Older kernels cannot; then they come later.
#ifdef MADV_POPULATE_WRITE
    madvise(data_, mapping_->size(), MADV_POPULATE_WRITE);
#endif
  } else {
    plain_ = std::aligned_alloc(kSpacing, (size + kSpacing - 1) / kSpacing * kSpacing);
    if (plain_ == nullptr)
      throw Error(ErrorKind::error, "no memory for a segment of " + std::to_string(size) + " bytes");
    std::memset(plain_, 0, size - options.staging_bytes);
    data_ = static_cast<std::byte*>(plain_);
  }
  header().asymmetric = register_membarrier() ? 1 : 0;
}

Segment::Segment(int local_ranks, const MemoryOptions& options, Fd fd)
    : local_ranks_(local_ranks), mapping_(std::make_unique<Mapping>(std::move(fd))), data_(mapping_->data()) {
  if (mapping_->size() != bytes(local_ranks, options))
    throw Error(ErrorKind::mismatch, "a peer's shared-memory segment has " + std::to_string(mapping_->size()) +
                                         " bytes, expected " + std::to_string(bytes(local_ranks, options)) +
                                         ": do all ranks run the same version with the same options?");
  mapping_->drop_fd();
}

Segment::~Segment() { std::free(plain_); }

MemoryHeader& Segment::header() const noexcept { return *reinterpret_cast<MemoryHeader*>(data_); }
MemoryCounter& Segment::consumed(int p) const noexcept {
  return reinterpret_cast<MemoryCounter*>(data_ + sizeof(MemoryHeader))[p];
}
MemorySlot* Segment::queue(int p) const noexcept {
  std::byte* queues = data_ + sizeof(MemoryHeader) + static_cast<size_t>(local_ranks_) * sizeof(MemoryCounter);
  return reinterpret_cast<MemorySlot*>(queues) + static_cast<ptrdiff_t>(p) * kQueueDepth;
}
std::byte* Segment::staging() const noexcept {
  return data_ + sizeof(MemoryHeader) +
         static_cast<size_t>(local_ranks_) * (sizeof(MemoryCounter) + kQueueDepth * sizeof(MemorySlot));
}

MemoryEndpoint::MemoryEndpoint(MemoryPeer own, std::vector<MemoryPeer> peers, int world_size, MemoryOptions options)
    : arena_(Arena::process()), own_(std::move(own)), index_(static_cast<size_t>(world_size), -1), options_(options) {
  local_ = !own_.segment->shared();
  staging_ = own_.segment->staging();
  fence_ = own_.segment->header().asymmetric == 0;
  for (MemoryPeer& peer : peers) {
    Link link;
    link.out = own_.segment->queue(peer.local_rank);
    link.in = peer.segment->queue(own_.local_rank);
    link.consumed_by_peer = &peer.segment->consumed(own_.local_rank);
    link.consumed_by_me = &own_.segment->consumed(peer.local_rank);
    fence_ |= peer.segment->header().asymmetric == 0;
    index_[static_cast<size_t>(peer.rank)] = static_cast<int>(links_.size());
    link.peer = std::move(peer);
    links_.push_back(std::move(link));
  }
  const size_t rings = options_.ring_per_peer ? std::max<size_t>(links_.size(), 1) : 1;
  const size_t share = options_.staging_bytes / rings / 64 * 64;
  for (size_t i = 0; i < rings; ++i) {
    rings_.emplace_back();
    rings_.back().begin = staging_ + i * share;
    rings_.back().capacity = share;
  }
}

bool MemoryEndpoint::sends_in_place(const std::byte* data, size_t nbytes) const noexcept {
  return local_ || nbytes <= kInline || arena_.contains(data, nbytes);
}

// Now and then ordinary stores are tried all the same, to notice when they have become fast.
bool MemoryEndpoint::streams() noexcept { return staging_is_slow_ && ++long_messages_ % kProbeEvery != 0; }

void MemoryEndpoint::staged(size_t nbytes, std::chrono::nanoseconds took) noexcept {
  if (nbytes < kLong) return;
  best_pace_ =
      std::max(best_pace_, static_cast<double>(nbytes) / static_cast<double>(std::max<int64_t>(took.count(), 1)));
  if (++paces_ < kPaces) return;
  staging_is_slow_ = best_pace_ < kSlowPace;
  best_pace_ = 0;
  paces_ = 0;
}

uint64_t MemoryEndpoint::consumed(Link& link) noexcept {
  return link.seen_consumed = link.consumed_by_peer->value.load(std::memory_order_acquire);
}

void MemoryEndpoint::reclaim(Ring& ring) noexcept {
  while (!ring.blocks.empty()) {
    const Block& block = ring.blocks.front();
    for (int i = 0; i < block.sends; ++i) {
      const auto [slot, number] = ring.sends[static_cast<size_t>(i)];
      Link& to = links_[static_cast<size_t>(slot)];
      if (to.seen_consumed <= number && consumed(to) <= number) return;
    }
    ring.sends.erase(ring.sends.begin(), ring.sends.begin() + block.sends);
    ring.tail = block.end;
    ring.blocks.pop_front();
  }
}

std::byte* MemoryEndpoint::reserve(Ring& ring, size_t nbytes) {
  const size_t need = line_up(nbytes), capacity = ring.capacity;
  if (need > capacity)
    throw Error(ErrorKind::error, "a slice of " + std::to_string(nbytes) + " bytes does not fit the staging ring of " +
                                      std::to_string(capacity));
  if (!ring.blocks.empty() && ring.blocks.back().sends == 0) {  // nobody was sent the last one
    ring.blocks.pop_back();
    ring.head = ring.blocks.empty() ? ring.tail : ring.blocks.back().end;
  }
  uint64_t begin = ring.head;
  if (begin % capacity + need > capacity) begin += capacity - begin % capacity;
  if (begin + need - ring.tail > capacity) {
    reclaim(ring);
    if (ring.blocks.empty()) ring.tail = ring.head = begin = (ring.head + capacity - 1) / capacity * capacity;
    if (begin + need - ring.tail > capacity) return nullptr;
  }
  ring.head = begin + need;
  ring.blocks.push_back({ring.head, 0});
  return ring.begin + begin % capacity;
}

uint64_t MemoryEndpoint::reference(const std::byte* data) const noexcept {
  if (local_) return reinterpret_cast<uint64_t>(data);
  return static_cast<uint64_t>(data - arena_.mapping().data());
}

bool MemoryEndpoint::try_send(int peer, const Signature& signature, const std::byte* data, size_t nbytes,
                              uint64_t& index) {
  Link& to = link(peer);
  if (to.sent - to.seen_consumed >= kQueueDepth && to.sent - consumed(to) >= kQueueDepth) return false;
  MemorySlot& slot = to.out[to.sent % kQueueDepth];
  slot.signature = signature;
  if (nbytes <= kInline) {
    if (nbytes > 0) std::memcpy(slot.payload, data, nbytes);
    slot.kind = kInlined + static_cast<uint32_t>(nbytes);
  } else {
    slot.far.nbytes = nbytes;
    slot.far.output = output_;
    if (data >= staging_ && data < staging_ + options_.staging_bytes) {
      slot.kind = kStaged;
      slot.far.data = static_cast<uint64_t>(data - staging_);
      Ring& from = ring_of(peer);
      ++from.blocks.back().sends;
      from.sends.emplace_back(index_[static_cast<size_t>(peer)], to.sent);
    } else if (to.peer.arena && to.peer.arena->contains(data, nbytes)) {
      slot.kind = kWritten;
      slot.far.data = static_cast<uint64_t>(data - to.peer.arena->data());
    } else {
      slot.kind = kReference;
      slot.far.data = reference(data);
      to.by_reference = to.sent + 1;
    }
  }
  index = to.sent++;
  to.bytes += nbytes;
  slot.tag.store(static_cast<uint32_t>(to.sent), std::memory_order_release);
  ring(to);
  return true;
}

void MemoryEndpoint::ring(const Link& to) noexcept {
  if (fence_) full_fence();
  MemoryHeader& header = to.peer.segment->header();
  if (header.sleeping.load(std::memory_order_relaxed) == 0) return;
  header.doorbell.fetch_add(1, std::memory_order_release);
  futex_wake(header.doorbell);
}

bool MemoryEndpoint::sent(int peer, uint64_t index) {
  Link& to = link(peer);
  if (to.by_reference == 0) return true;  // all were copied
  // A later one that was copied vouches for those before it, too.
  const uint64_t last = std::min(index, to.by_reference - 1);
  return to.seen_consumed > last || consumed(to) > last;
}

bool MemoryEndpoint::peek(int peer, Signature& signature) {
  const Link& from = link(peer);
  const MemorySlot& slot = from.in[from.received % kQueueDepth];
  if (slot.tag.load(std::memory_order_acquire) != static_cast<uint32_t>(from.received + 1)) return false;
  signature = slot.signature;
  return true;
}

const std::byte* MemoryEndpoint::try_recv(int peer, const Signature& signature, size_t nbytes, std::byte* /*into*/) {
  Link& from = link(peer);
  MemorySlot& slot = from.in[from.received % kQueueDepth];
  if (slot.tag.load(std::memory_order_acquire) != static_cast<uint32_t>(from.received + 1)) return nullptr;
  const uint32_t kind = slot.kind;
  const size_t length = kind >= kInlined ? kind - kInlined : slot.far.nbytes;
  if (!(slot.signature == signature) || length != nbytes) [[unlikely]] {
    std::string text = "rank " + std::to_string(peer) + " is in " + describe(slot.signature);
    text += slot.signature == signature
                ? ", message of " + std::to_string(length) + " bytes, expected " + std::to_string(nbytes)
                : " (" + difference(signature, slot.signature) + ")";
    throw Error(ErrorKind::mismatch, text);
  }
  ++from.received;
  if (armed_) {
    armed_ = false;
    own_.segment->header().sleeping.store(0, std::memory_order_relaxed);
  }
  if (kind >= kInlined) return slot.payload;
  if (kind == kStaged) return from.peer.segment->staging() + slot.far.data;
  if (kind == kWritten) return arena_.mapping().data() + slot.far.data;
  std::byte* const base = local_ ? nullptr : from.peer.arena->data();
  if (slot.far.output != kNowhere) from.output = base + slot.far.output;
  return base + slot.far.data;
}

void MemoryEndpoint::release(int peer) {
  Link& from = link(peer);
  from.consumed_by_me->value.store(++from.released, std::memory_order_release);
  ring(from);
}

void MemoryEndpoint::begin(const std::byte* output) {
  const bool known = output != nullptr && (local_ || arena_.contains(output, 1));
  output_ = known ? reference(output) : kNowhere;
  for (Link& link : links_) link.output = nullptr;
}

uint64_t MemoryEndpoint::yielded(const Link& link) noexcept {
  return link.peer.segment->header().yielded.load(std::memory_order_relaxed);
}

std::byte* MemoryEndpoint::peer_output(int peer) { return link(peer).output; }

// Ranks that wait for each other on one core answer ten times more slowly than on two, and each looks so busy that the
// system takes a quarter of a second to part them. Those that handed on this very core while this rank had handed it on
// are queued here; where that is more than this core's share of the ranks, the highest of them leaves. A rank that
// computes hands on nothing and is left alone.
void MemoryEndpoint::yield(int /*peer*/) {
  const auto core = static_cast<uint32_t>(sched_getcpu());
  const bool looks = ++yields_ % kYieldsPerLook == 0;
  if (looks)
    for (Link& link : links_) link.last_yield = yielded(link);
  own_.segment->header().yielded.store(uint64_t{yields_} << 32 | core, std::memory_order_relaxed);
  sched_yield();
  if (!looks) return;
  size_t here = 1;
  bool highest = true;
  for (const Link& link : links_) {
    const uint64_t now = yielded(link);
    if (now == link.last_yield || static_cast<uint32_t>(now) != core) continue;
    ++here;
    highest &= link.peer.local_rank < own_.local_rank;
  }
  if (here > 1 && highest) leave_core(core, here);
}

/// Moves to one of the usable cores with the fewest ranks, if `here` ranks are more than this one's share.
void MemoryEndpoint::leave_core(uint32_t core, size_t here) noexcept {
  const auto now = std::chrono::steady_clock::now();
  cpu_set_t all;
  if (now < settled_ || sched_getaffinity(0, sizeof all, &all) != 0) return;
  settled_ = now + kSettle;
  const size_t ranks = links_.size() + 1, cores = static_cast<size_t>(CPU_COUNT(&all));
  if (here <= (ranks + cores - 1) / cores) return;
  std::array<size_t, CPU_SETSIZE> ranks_on{};  // where each waited last
  for (const Link& link : links_)
    if (const uint64_t word = yielded(link)) ++ranks_on[static_cast<uint32_t>(word) % CPU_SETSIZE];
  cpu_set_t best;
  CPU_ZERO(&best);
  size_t fewest = here - 1;  // as many others as on this core: no better
  for (uint32_t c = 0; c < CPU_SETSIZE; ++c) {
    if (!CPU_ISSET(c, &all) || ranks_on[c] > fewest || c == core) continue;
    if (ranks_on[c] < fewest) CPU_ZERO(&best);
    if (ranks_on[c] < here - 1) CPU_SET(c, &best);
    fewest = ranks_on[c];
  }
  if (CPU_COUNT(&best) > 0 && sched_setaffinity(0, sizeof best, &best) == 0) sched_setaffinity(0, sizeof all, &all);
}

/// There is one doorbell, whoever rings.
void MemoryEndpoint::wait_any(std::span<const int> /*peers*/, std::chrono::microseconds at_most) {
  MemoryHeader& header = own_.segment->header();
  if (!armed_) {
    // First call: say that we sleep and let the caller look once more. Second call: sleep.
    armed_ = true;
    doorbell_seen_ = header.doorbell.load(std::memory_order_acquire);
    header.sleeping.store(1, std::memory_order_seq_cst);
    if (header.asymmetric != 0) syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0);
    full_fence();
    return;
  }
  if (!interrupted_.load(std::memory_order_acquire)) futex_wait(header.doorbell, doorbell_seen_, at_most);
  armed_ = false;
  header.sleeping.store(0, std::memory_order_relaxed);
}

void MemoryEndpoint::interrupt() noexcept {
  interrupted_.store(true, std::memory_order_release);
  nudge();
}

void MemoryEndpoint::nudge() noexcept {
  MemoryHeader& header = own_.segment->header();
  header.doorbell.fetch_add(1, std::memory_order_release);
  futex_wake(header.doorbell);
}

uint64_t MemoryEndpoint::bytes_sent(int peer) const {
  return links_[static_cast<size_t>(index_[static_cast<size_t>(peer)])].bytes;
}

}  // namespace paracomm
