// One rank's share of a schedule: what Python's `project(schedule, rank)` hands over. Bytes, dtypes and slices come
// later (Plan).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/signature.h"

namespace paracomm {

enum class OpKind : int32_t { send = 0, recv = 1, reduce = 2, copy = 3 };

/// Buffers of a program. `data` starts as the input and ends as the output; a program uses either `data` or input and
/// output.
enum class BufferId : int32_t { data = 0, input = 1, output = 2, scratch = 3 };

/// `span` chunks of a buffer, from `chunk` on.
struct Region {
  BufferId buffer = BufferId::data;
  int32_t chunk = 0;
  int32_t span = 1;

  friend bool operator==(const Region&, const Region&) = default;
};

struct Op {
  OpKind kind = OpKind::copy;
  Region src;         ///< send, reduce, copy
  Region dst;         ///< recv, reduce, copy; for send: the region at the peer
  int32_t peer = -1;  ///< send, recv
  int32_t level =
      0;  ///< longest chain of transfers up to this op, over the whole schedule; both ends of a transfer agree
  int32_t size_chunk = 0;    ///< the first data chunk whose size the op moves (scratch has no size of its own)
  bool final = false;        ///< reduce: the result holds every rank's contribution (avg divides here)
  bool early_write = false;  ///< send: when the sender gets here, nothing uses the peer's region any more
};

struct Program {
  std::string name;  ///< "ring", ...
  Collective collective = Collective::custom;
  int32_t rank = 0;
  int32_t world_size = 1;
  int32_t root = -1;
  int32_t chunks = 1;  ///< chunks of data / input / output
  int32_t scratch_chunks = 0;
  int32_t volume = 0;        ///< the most chunks that any rank sends
  int32_t levels = 0;        ///< the highest level of any op of any rank
  int32_t pair_depth = 0;    ///< the most chunks that one rank sends to one other in one level
  uint32_t fingerprint = 0;  ///< of the whole schedule, equal on all ranks
  std::vector<Op> ops;
};

/// Throws Error(schedule) if an op names a chunk, rank, level or kind that there is not. Plans trust the ranges.
void check_ranges(const Program& program);

}  // namespace paracomm
