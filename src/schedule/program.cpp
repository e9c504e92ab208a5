#include "schedule/program.h"

#include "core/error.h"

namespace paracomm {
namespace {

constexpr int32_t kMost = 1 << 20;  ///< chunks, levels: what they are counted with does not overflow

class Checker {
 public:
  explicit Checker(const Program& program) : program_(program) {}

  void in_range(const char* what, int64_t value, int64_t least, int64_t most, int64_t op = -1) const {
    if (value >= least && value <= most) return;
    const std::string where = op < 0 ? "" : "op " + std::to_string(op) + ": ";
    throw Error(ErrorKind::schedule, std::string(name_of(program_.collective)) + "[" + program_.name + "] rank " +
                                         std::to_string(program_.rank) + ": " + where + what + " is " +
                                         std::to_string(value) + ", expected " + std::to_string(least) + " to " +
                                         std::to_string(most));
  }

  /// `own`: of this rank, whose chunks of scratch are known.
  void region(const char* what, const Region& region, bool own, int64_t op) const {
    in_range(what, static_cast<int32_t>(region.buffer), 0, static_cast<int32_t>(BufferId::scratch), op);
    const int32_t scratch = own ? program_.scratch_chunks : kMost;
    const int32_t chunks = region.buffer == BufferId::scratch ? scratch : program_.chunks;
    in_range(what, region.span, 1, chunks, op);
    in_range(what, region.chunk, 0, chunks - region.span, op);
  }

 private:
  const Program& program_;
};

}  // namespace

void check_ranges(const Program& program) {
  const Checker check(program);
  check.in_range("collective", static_cast<int>(program.collective), 0, static_cast<int>(Collective::custom));
  check.in_range("root", program.root, -1, program.world_size - 1);
  check.in_range("chunks", program.chunks, 1, kMost);
  check.in_range("scratch_chunks", program.scratch_chunks, 0, kMost);
  check.in_range("volume", program.volume, 0, kMost);
  check.in_range("levels", program.levels, 0, kMost);
  check.in_range("pair_depth", program.pair_depth, 0, kMost);
  for (size_t i = 0; i < program.ops.size(); ++i) {
    const Op& op = program.ops[i];
    const auto at = static_cast<int64_t>(i);
    check.in_range("kind", static_cast<int32_t>(op.kind), 0, static_cast<int32_t>(OpKind::copy), at);
    const bool send = op.kind == OpKind::send, recv = op.kind == OpKind::recv;
    check.region("source", op.src, !recv, at);
    check.region("destination", op.dst, !send, at);
    check.in_range("span of the destination", op.dst.span, op.src.span, op.src.span, at);
    check.in_range("size chunk", op.size_chunk, 0, program.chunks - op.src.span, at);
    check.in_range("level", op.level, send || recv ? 1 : 0, kMost, at);
    if (send || recv) check.in_range("peer", op.peer, 0, program.world_size - 1, at);
    if ((send || recv) && op.peer == program.rank) check.in_range("peer", op.peer, -1, -1, at);
  }
}

}  // namespace paracomm
