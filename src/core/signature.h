// What a rank is doing, small enough to travel with every message.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace paracomm {

enum class Collective : uint8_t {
  all_reduce,
  reduce,
  broadcast,
  all_gather,
  reduce_scatter,
  all_to_all,
  gather,
  scatter,
  barrier,
  send,
  recv,
  custom
};
const char* name_of(Collective collective) noexcept;

/// Where the data of an operation lie and who works on it.
enum class Processor : uint8_t { host, device };
const char* name_of(Processor processor) noexcept;

/// Equal on all ranks of a collective, or the call is a mismatch.
struct Signature {
  uint32_t sequence = 0;  ///< number of the operation on its communicator
  uint32_t schedule = 0;  ///< fingerprint of the schedule
  uint64_t count = 0;     ///< elements (for uneven collectives: a fingerprint of all counts)
  Collective collective = Collective::custom;
  DType dtype = DType::uint8;
  ReduceOp op = ReduceOp::sum;
  Processor processor = Processor::host;
  int32_t root = -1;  ///< of a send: its tag

  friend bool operator==(const Signature&, const Signature&) = default;
};
static_assert(sizeof(Signature) == 24);

/// "all_reduce #812 (float32 x 1024, sum)".
std::string describe(const Signature& signature);
/// "dtype float32 here, int32 there; ...": what differs.
std::string difference(const Signature& here, const Signature& there);

}  // namespace paracomm
