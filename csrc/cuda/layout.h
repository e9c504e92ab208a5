// One allocation a rank, which all its peers map: where in it lies what.
//
//   inboxes   one a channel and peer: kSlots flags, then a ring of bytes. The peer writes, this rank reads.
//   credits   one a channel and peer: how far the peer has read what this rank sent. The peer writes.
//   stages    one a block and peer: how far the peer is in a one-shot or two-shot, for two calls. The peer writes.
//   staging   two buffers: this rank's input of a one-shot or two-shot. The peers read.
//   cursors   how many messages were sent and received. For this rank alone; kept from launch to launch, so that a
//             launch needs no number of its own and may be replayed by a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/namespace.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

constexpr int kMaxRanks = 32;
constexpr int kMaxOperands = 64;  ///< sources of an instruction, and destinations
constexpr int kSlots = 128;       ///< messages of a pair and channel that may be on their way
constexpr size_t kUnit = 64;      ///< messages begin at multiples of it
constexpr size_t kSector = 128;   ///< what different writers write lies this far apart
constexpr int kWords = 3;         ///< of a Signature

/// The flag of a message, or of a stage: whose call it is, and its number, written last.
struct Flag {
  uint64_t signature[kWords];
  uint64_t nbytes;  ///< of the message
  uint64_t number;
};

/// Messages of a pair and channel so far, and where in the ring the next may begin, in units since the start.
struct Cursor {
  uint64_t number;
  uint64_t head;
};

struct Layout {
  int world_size, channels, shot_blocks;
  size_t ring_bytes, staging_bytes;

  __host__ __device__ size_t pairs() const { return static_cast<size_t>(channels) * static_cast<size_t>(world_size); }
  __host__ __device__ size_t pair(int channel, int peer) const {
    return static_cast<size_t>(channel) * static_cast<size_t>(world_size) + static_cast<size_t>(peer);
  }
  __host__ __device__ size_t inbox_bytes() const { return kSlots * sizeof(Flag) + ring_bytes; }
  __host__ __device__ size_t inbox(int channel, int peer) const { return pair(channel, peer) * inbox_bytes(); }
  __host__ __device__ size_t ring(int channel, int peer) const { return inbox(channel, peer) + kSlots * sizeof(Flag); }
  __host__ __device__ size_t credits() const { return pairs() * inbox_bytes(); }
  __host__ __device__ size_t credit(int channel, int peer) const { return credits() + pair(channel, peer) * kSector; }
  __host__ __device__ size_t stages() const { return credits() + pairs() * kSector; }
  __host__ __device__ size_t stage(int block, int peer, int parity) const {
    return stages() + pair(block, peer) * kSector + static_cast<size_t>(parity) * sizeof(Flag);
  }
  __host__ __device__ size_t calls() const {
    return stages() + static_cast<size_t>(shot_blocks) * static_cast<size_t>(world_size) * kSector;
  }
  /// How many one-shots and two-shots a block has been through.
  __host__ __device__ size_t call(int block) const { return calls() + static_cast<size_t>(block) * kSector; }
  __host__ __device__ size_t staging(int parity) const {
    return calls() + static_cast<size_t>(shot_blocks) * kSector + static_cast<size_t>(parity) * staging_bytes;
  }
  __host__ __device__ size_t cursors() const { return staging(2); }
  __host__ __device__ size_t sent(int channel, int peer) const {
    return cursors() + pair(channel, peer) * sizeof(Cursor);
  }
  __host__ __device__ size_t received(int channel, int peer) const {
    return cursors() + (pairs() + pair(channel, peer)) * sizeof(Cursor);
  }
  __host__ __device__ size_t nbytes() const { return cursors() + 2 * pairs() * sizeof(Cursor); }
};

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
