// Shared memory between the ranks of one host (processes: "shm"; threads of one process: "local").
//
// Each rank owns a segment that its local peers map:
//   doorbell      where the owner sleeps
//   yielded       on which core the owner last handed it on while it waited, and how often it did
//   consumed[p]   how many messages from local peer p the owner has released (written by the owner, read by p)
//   queue[p]      messages from the owner to p: a ring of one-line descriptors, the flag and a short payload in the
//   same line staging       a ring of bytes; one staged copy serves all its readers
// Bytes that peers map anyway (an arena; with threads, everything) are not staged: the descriptor says where they are.
//
// Ordinary stores to staging run at 15-20 GB/s where two cores share a cache, and at 2.5 GB/s where they do not,
// because each line that a peer has read must be fetched back from it first; stores past the cache give both cases the
// second-best time (64 MiB at 2 ranks: 6.4 ms and 32 ms with ordinary stores, 8-10 ms past the cache; letting the peer
// read private memory by process_vm_readv took 20-27 ms). Virtual machines are moved from one case to the other while
// they run, so the endpoint watches its pace and chooses.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "transport/arena.h"
#include "transport/transport.h"

namespace paracomm {

struct MemoryOptions {
  size_t staging_bytes = 1280 << 10;
  /// Cut staging into a ring for each peer: one that takes nothing then holds up no other, and nothing serves several.
  bool ring_per_peer = false;
};

struct MemorySlot;
struct MemoryHeader;
struct MemoryCounter;

/// A segment's memory: a memfd (shm) or plain memory (local).
class Segment {
 public:
  Segment(int local_ranks, const MemoryOptions& options, bool shared);
  /// A peer's.
  Segment(int local_ranks, const MemoryOptions& options, Fd fd);
  ~Segment();

  /// True: a memfd.
  bool shared() const noexcept { return mapping_ != nullptr; }
  /// Of a memfd of our own that was not dropped; else negative.
  int fd() const noexcept { return mapping_ ? mapping_->fd() : -1; }
  /// Once all peers were passed the descriptor.
  void drop_fd() noexcept { mapping_->drop_fd(); }
  MemoryHeader& header() const noexcept;
  MemoryCounter& consumed(int local_peer) const noexcept;
  MemorySlot* queue(int local_peer) const noexcept;
  std::byte* staging() const noexcept;

 private:
  static size_t bytes(int local_ranks, const MemoryOptions& options) noexcept;

  int local_ranks_;
  std::unique_ptr<Mapping> mapping_;
  void* plain_ = nullptr;
  std::byte* data_ = nullptr;
};

struct MemoryPeer {
  int rank = -1;
  int local_rank = -1;
  std::shared_ptr<Segment> segment;
  std::shared_ptr<Mapping> arena;  ///< null: the same process
};

class MemoryEndpoint final : public Endpoint {
 public:
  /// `own.segment` is this rank's; `peers` are the other ranks of the host.
  MemoryEndpoint(MemoryPeer own, std::vector<MemoryPeer> peers, int world_size, MemoryOptions options);

  const char* name() const noexcept override { return local_ ? "local" : "shm"; }
  bool sends_in_place(const std::byte* data, size_t nbytes) const noexcept override;
  bool stages() const noexcept override { return true; }
  std::byte* try_reserve(size_t nbytes) override { return reserve(rings_.front(), nbytes); }
  std::byte* try_reserve_for(int peer, size_t nbytes) override { return reserve(ring_of(peer), nbytes); }
  bool streams() noexcept override;
  void staged(size_t nbytes, std::chrono::nanoseconds took) noexcept override;
  bool try_send(int peer, const Signature& signature, const std::byte* data, size_t nbytes, uint64_t& index) override;
  bool sent(int peer, uint64_t index) override;
  bool peek(int peer, Signature& signature) override;
  const std::byte* try_recv(int peer, const Signature& signature, size_t nbytes, std::byte* into) override;
  void release(int peer) override;
  void begin(const std::byte* output) override;
  std::byte* peer_output(int peer) override;
  bool progress() override { return false; }
  void yield(int peer) override;
  void wait_any(std::span<const int> peers, std::chrono::microseconds at_most) override;
  void interrupt() noexcept override;
  void nudge() noexcept override;
  uint64_t bytes_sent(int peer) const override;

 private:
  struct Link {
    MemoryPeer peer;
    MemorySlot* out = nullptr;
    MemorySlot* in = nullptr;
    MemoryCounter* consumed_by_peer = nullptr;  // of what we sent
    MemoryCounter* consumed_by_me = nullptr;
    uint64_t sent = 0, seen_consumed = 0, received = 0, released = 0, bytes = 0;
    std::byte* output = nullptr;
    uint64_t last_yield = 0;
    uint64_t by_reference = 0;  // last message whose bytes the peer reads from our memory, plus one
  };
  struct Block {
    uint64_t end = 0;
    int sends = 0;
  };
  struct Ring {
    std::byte* begin = nullptr;
    size_t capacity = 0;
    uint64_t head = 0, tail = 0;
    std::deque<Block> blocks;
    std::deque<std::pair<int, uint64_t>> sends;
  };

  Link& link(int rank) { return links_[static_cast<size_t>(index_[static_cast<size_t>(rank)])]; }
  uint64_t consumed(Link& link) noexcept;
  Ring& ring_of(int rank) noexcept {
    return rings_[options_.ring_per_peer ? static_cast<size_t>(index_[static_cast<size_t>(rank)]) : 0];
  }
  std::byte* reserve(Ring& ring, size_t nbytes);
  void reclaim(Ring& ring) noexcept;
  static uint64_t yielded(const Link& link) noexcept;
  void leave_core(uint32_t core, size_t here) noexcept;
  void ring(const Link& link) noexcept;
  uint64_t reference(const std::byte* data) const noexcept;

  Arena& arena_;
  MemoryPeer own_;
  std::vector<Link> links_;
  std::vector<int> index_;  ///< by rank
  MemoryOptions options_;
  bool local_ = false, fence_ = true;
  std::byte* staging_ = nullptr;
  std::vector<Ring> rings_;
  uint64_t output_ = 0;
  bool armed_ = false;
  uint32_t doorbell_seen_ = 0;
  bool staging_is_slow_ = false;
  double best_pace_ = 0;  ///< bytes per nanosecond, of the last few long messages that were staged
  int paces_ = 0;
  uint64_t long_messages_ = 0;
  std::atomic<bool> interrupted_{false};
  uint32_t yields_ = 0;
  std::chrono::steady_clock::time_point settled_{};  ///< when this rank may move to another core again
};

}  // namespace paracomm
