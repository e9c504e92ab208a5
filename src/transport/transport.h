// The narrow waist: what a transport does for an executor. A transport knows bytes, peers and order, never operators or
// dtypes.
//
// Between two ranks of one communicator there is one ordered stream of messages in each direction. Sender and receiver
// both know, from the plan, how long the next message is; the signature of the collective travels with each message, so
// that two ranks that do different things find out. One thread at a time uses an Endpoint; only `interrupt()` and
// `nudge()` may come from another.
#pragma once

#include <sched.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/signature.h"

namespace paracomm {

/// One rank's end of a transport: the peers of a communicator that this transport reaches. `peer` is a rank.
class Endpoint {
 public:
  virtual ~Endpoint() = default;
  virtual const char* name() const noexcept = 0;

  // --- sending ---
  /// True: a send of these bytes copies nothing in user space (TCP: always; shared memory: the peers map them, or they
  /// are few).
  virtual bool sends_in_place(const std::byte* data, size_t nbytes) const noexcept = 0;
  /// True: there is memory to reserve. False: every send leaves from the caller's.
  virtual bool stages() const noexcept = 0;
  /// Memory to write a message into, for one or several of the next sends. nullptr: no room yet, `wait` and try again.
  virtual std::byte* try_reserve(size_t nbytes) = 0;
  /// The same for sends to one peer alone; an endpoint may keep room for each, so that none holds up another.
  virtual std::byte* try_reserve_for(int /*peer*/, size_t nbytes) { return try_reserve(nbytes); }
  /// True: what is reserved had better be written past the cache, because the lines are in another core's.
  virtual bool streams() noexcept { return false; }
  /// How long it took to write `nbytes` there by ordinary stores; transports with a choice learn from it.
  virtual void staged(size_t /*nbytes*/, std::chrono::nanoseconds /*took*/) noexcept {}
  /// Queues one message to `peer`; `data` is reserved memory, or bytes that stay as they are until `sent(peer, index)`.
  /// `index` counts the messages to this peer from 0. False: the queue is full, `wait` and try again.
  virtual bool try_send(int peer, const Signature& signature, const std::byte* data, size_t nbytes,
                        uint64_t& index) = 0;
  /// True when message `index` to `peer` no longer needs the sender's memory.
  virtual bool sent(int peer, uint64_t index) = 0;

  // --- receiving ---
  /// True when the signature of the next message from `peer` is known; it is put into `signature`. For users who cannot
  /// tell what comes next.
  virtual bool peek(int peer, Signature& signature) = 0;
  /// The bytes of the next message from `peer`, or nullptr if it is not complete yet. They lie in `into` (room for
  /// `nbytes`) or wherever the transport has them, until `release(peer)`. Call again with the same arguments until it
  /// succeeds. Throws Error(mismatch) if the message has another signature or length, Error(peer_lost) if the peer is
  /// gone.
  virtual const std::byte* try_recv(int peer, const Signature& signature, size_t nbytes, std::byte* into) = 0;
  /// Ends the use of the message that `try_recv` returned.
  virtual void release(int peer) = 0;

  // --- memory that peers map (only shared-memory transports override these) ---
  /// The collective that starts now writes its result to `output`.
  virtual void begin(const std::byte* /*output*/) {}
  /// Where `peer`'s output of the collective under way is mapped here, nullptr if it is not (yet known to be).
  virtual std::byte* peer_output(int /*peer*/) { return nullptr; }

  // --- waiting ---
  /// Hands the core to whoever is queued behind this thread, which may be `peer`.
  virtual void yield(int /*peer*/) { sched_yield(); }
  /// Moves queued bytes along without blocking. False: nothing is queued, so that no peer depends on further calls.
  virtual bool progress() = 0;
  /// Blocks until something may have changed between this rank and one of `peers`, `interrupt()` or `nudge()` is
  /// called, or `at_most` has passed. May also return without a reason: look again, and call again.
  virtual void wait_any(std::span<const int> peers, std::chrono::microseconds at_most) = 0;
  void wait(int peer, std::chrono::microseconds at_most) { wait_any({&peer, 1}, at_most); }
  /// Wakes a wait now and makes every later one return at once. From any thread.
  virtual void interrupt() noexcept = 0;
  /// Wakes a wait now; later ones sleep again. From any thread.
  virtual void nudge() noexcept = 0;

  /// Gives descriptors back. After it nothing but interrupt(), nudge() and bytes_sent() is called.
  virtual void close() noexcept {}

  /// Bytes of payload handed to `peer` since the start (without framing).
  virtual uint64_t bytes_sent(int peer) const = 0;
};

}  // namespace paracomm
