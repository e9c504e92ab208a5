#include "schedule/plan.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <sstream>
#include <tuple>

#include "core/error.h"
#include "core/limits.h"

namespace paracomm {
namespace {

constexpr size_t kAbsent = static_cast<size_t>(-1);
constexpr size_t kLongestSlice = 256 << 10;
constexpr size_t kShortSlice = 1024;
constexpr size_t kLine = 64;  // slices start on cache lines where the chunk does
constexpr size_t kAddressable = size_t{1} << 47;

[[noreturn]] void fail(const Program& program, const std::string& what) {
  throw Error(ErrorKind::schedule, std::string(name_of(program.collective)) + "[" + program.name + "] rank " +
                                       std::to_string(program.rank) + ": " + what);
}

std::string text(const Region& region) {
  static const char* const kNames[] = {"data", "input", "output", "scratch"};
  std::string s = std::string(kNames[static_cast<int>(region.buffer)]) + "[" + std::to_string(region.chunk);
  return s + (region.span > 1 ? ":" + std::to_string(region.chunk + region.span) + "]" : "]");
}

bool overlaps(const Region& a, const Region& b) {
  return a.buffer == b.buffer && a.chunk < b.chunk + b.span && b.chunk < a.chunk + a.span;
}

/// A multi-chunk op as one op a chunk (where the chunks do not lie back to back).
std::vector<Op> explode(const std::vector<Op>& ops) {
  std::vector<Op> out;
  for (const Op& op : ops) {
    const int span = std::max(op.kind == OpKind::recv ? op.dst.span : op.src.span, 1);
    for (int j = 0; j < span; ++j) {
      Op one = op;
      one.src.chunk += j;
      one.dst.chunk += j;
      one.src.span = one.dst.span = 1;
      one.size_chunk += j;
      out.push_back(one);
    }
  }
  return out;
}

}  // namespace

/// Turns ops into instructions by holding back each value ("pending") until it is read, so that what arrives, what is
/// added and what leaves become one pass.
class PlanBuilder {
 public:
  PlanBuilder(const Program& program, const Shape& shape, Plan& plan) : program_(program), shape_(shape), plan_(plan) {}

  void build() {
    layout();
    for (const Op& op : ops_) place_written_later(op);
    precopy();
    for (size_t i = 0; i < ops_.size(); ++i) {
      at_ = i;
      step(ops_[i]);
    }
    at_ = ops_.size();
    while (!pending_.empty()) flush(0);
    finish_outputs();
    liveness();
    order();
    write_after_send();
    check_queues();
    check_extents();
  }

 private:
  struct Operand {
    Source source;
    Region region;      // local: what is read; remote: where the message was headed
    int32_t order = 0;  // remote: index of the recv op
    int32_t level = 0;
  };
  struct Pending {
    Region dst;
    std::vector<Operand> operands;
    int32_t level = 0, size_chunk = 0;
    bool final = false;
  };

  // --- layout ---
  std::vector<Plan::Chunk> cut(const std::vector<size_t>& blocks) const {
    const size_t n_blocks = std::max<size_t>(blocks.size(), 1);
    const size_t each = std::max<size_t>(program_.chunks / n_blocks, 1);
    const size_t line = kLine / plan_.element_;
    std::vector<Plan::Chunk> chunks;
    size_t begin = 0;
    for (size_t count : blocks) {
      const size_t grain = count >= each * line * 4 ? line : 1;
      auto edge = [&](size_t j) { return j == each ? count : count * j / each / grain * grain; };
      for (size_t j = 0; j < each; ++j) chunks.push_back({begin + edge(j), edge(j + 1) - edge(j)});
      begin += count;
    }
    return chunks;
  }

  bool own(int32_t chunk) const {
    const int32_t each = program_.chunks / std::max(program_.world_size, 1);
    return chunk / std::max(each, 1) == program_.rank;
  }

  void keep_own(std::vector<Plan::Chunk>& chunks) const {
    size_t first = kAbsent;
    for (int32_t c = 0; c < static_cast<int32_t>(chunks.size()); ++c) {
      if (!own(c)) {
        chunks[c].offset = kAbsent;
      } else {
        if (first == kAbsent) first = chunks[c].offset;
        chunks[c].offset -= first;
      }
    }
  }

  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(ErrorKind::invalid_argument, std::string(name_of(program_.collective)) + "[" + program_.name +
                                                 "] rank " + std::to_string(program_.rank) + ": " + what);
  }

  /// The arithmetic below is safe for what a process can address.
  void check_size(const std::vector<size_t>& blocks) const {
    size_t left = kAddressable / plan_.element_;
    for (size_t count : blocks) {
      if (count > left || count > SIZE_MAX / static_cast<size_t>(program_.chunks))
        refuse("more than the " + std::to_string(kAddressable) + " bytes that a process can address");
      left -= count;
    }
  }

  void layout() {
    plan_.element_ = size_of(shape_.dtype);
    const bool by_block = shape_.blocks.size() > 1;
    if (program_.chunks < 1 || (by_block && program_.chunks % static_cast<int32_t>(shape_.blocks.size()) != 0))
      fail(program_, std::to_string(program_.chunks) + " chunks do not divide into " +
                         std::to_string(shape_.blocks.size()) + " blocks");
    if (!shape_.output_blocks.empty() && shape_.output_blocks.size() != shape_.blocks.size())
      refuse(std::to_string(shape_.output_blocks.size()) + " blocks of output, " +
             std::to_string(shape_.blocks.size()) + " of input");
    check_size(shape_.blocks);
    check_size(shape_.output_blocks);
    plan_.chunks_ = plan_.input_chunks_ = plan_.output_chunks_ = cut(shape_.blocks);
    auto& in = plan_.input_chunks_;
    auto& out = plan_.output_chunks_;
    const bool root = program_.rank == program_.root;
    auto none = [](std::vector<Plan::Chunk>& chunks) {
      for (auto& chunk : chunks) chunk.offset = kAbsent;
    };
    switch (program_.collective) {
      case Collective::reduce:
        if (!root) none(out);
        break;
      case Collective::broadcast:
        if (!root) none(in);
        break;
      case Collective::all_gather:
        keep_own(in);
        break;
      case Collective::gather:
        keep_own(in);
        if (!root) none(out);
        break;
      case Collective::reduce_scatter:
        keep_own(out);
        break;
      case Collective::scatter:
        keep_own(out);
        if (!root) none(in);
        break;
      case Collective::all_to_all:
        out = cut(shape_.output_blocks.empty() ? shape_.blocks : shape_.output_blocks);
        break;
      default:
        break;
    }
    symmetric_output_ = program_.collective == Collective::all_reduce || program_.collective == Collective::broadcast ||
                        program_.collective == Collective::all_gather;
    tile();
  }

  void tile() {
    size_t largest = shape_.largest_chunk, smallest = kAbsent;
    for (const auto& chunk : plan_.chunks_) {
      largest = std::max(largest, chunk.count);
      smallest = std::min(smallest, chunk.count);
    }
    if (program_.collective == Collective::all_to_all)
      for (const auto& chunk : plan_.output_chunks_) largest = std::max(largest, chunk.count);
    const size_t bytes = largest * plan_.element_;
    const auto volume = static_cast<size_t>(std::max(program_.volume, 1));
    size_t slice = std::min(shape_.window_bytes / volume / kLine * kLine, kLongestSlice);
    // Messages that do not fit the window would wait for each other for ever.
    if (slice < 2 * kLine)
      refuse("window_bytes is " + std::to_string(shape_.window_bytes) + ", expected at least " +
             std::to_string(2 * kLine * volume) + " for the " + std::to_string(volume) + " chunks that a rank sends");
    if (slice < kShortSlice) slice -= kLine;  // cut at lines, some are one longer: there is room for that in long ones
    const size_t tiles = std::max<size_t>(1, (bytes + slice - 1) / slice);
    if (bytes > kAddressable || tiles > INT32_MAX || largest > SIZE_MAX / tiles)
      refuse("blocks of " + std::to_string(bytes) + " bytes are too many slices of " + std::to_string(slice));
    plan_.tiles_ = static_cast<int32_t>(tiles);
    plan_.slot_bytes_ = (bytes + kLine - 1) / kLine * kLine;
    plan_.levels_ = program_.levels;
    for (const Op& op : program_.ops) plan_.levels_ = std::max(plan_.levels_, op.level);
    const int32_t depth = std::max(program_.pair_depth, 1);
    if (2 * depth > kQueueDepth)
      fail(program_, "one level sends " + std::to_string(depth) + " messages to one peer, at most " +
                         std::to_string(kQueueDepth / 2) + " fit its queue");
    plan_.stride_ = std::max(1, (plan_.levels_ * depth * 2 + kQueueDepth - 1) / kQueueDepth);
    // Of a pair's messages, `lag` times' worth and one more may be on their way.
    while (plan_.lag_ < shape_.lag && (plan_.lag_ + 2) * depth * plan_.levels_ <= kQueueDepth) ++plan_.lag_;
    plan_.in_flight_ = plan_.levels_ * plan_.lag_ / plan_.stride_ + 1;
    const bool all_to_all = program_.collective == Collective::all_to_all;
    // Chunks of one op lie back to back where all are alike and in one place; here a rank's own is apart from the rest.
    const bool apart =
        program_.collective == Collective::reduce_scatter || program_.collective == Collective::scatter || all_to_all;
    const bool whole = plan_.tiles_ == 1 && smallest == largest && !apart;
    ops_ = whole ? program_.ops : explode(program_.ops);
    if (whole) plan_.slot_bytes_ = bytes;
    plan_.scratch_slots_ = program_.scratch_chunks + program_.chunks;
    written_.assign(program_.chunks, false);
    will_write_.assign(program_.chunks, false);
  }

  // --- where values live ---
  bool is_data(const Region& region) const { return region.buffer == BufferId::data; }

  /// Finds the chunks that must be copied from the input first: read together with others that were written before.
  void place_written_later(const Op& op) {
    if (op.kind != OpKind::recv) note_read(op.src);
    if (op.kind == OpKind::reduce) note_read(op.dst);
    if (op.kind != OpKind::send && is_data(op.dst))
      for (int c = op.dst.chunk; c < op.dst.chunk + op.dst.span; ++c) will_write_[c] = true;
  }
  void note_read(const Region& region) {
    if (!is_data(region) || region.span == 1) return;
    bool some = false, all = true;
    for (int c = region.chunk; c < region.chunk + region.span; ++c) {
      some |= will_write_[c];
      all &= will_write_[c];
    }
    if (!some || all) return;
    for (int c = region.chunk; c < region.chunk + region.span; ++c) {
      if (!will_write_[c]) early_copies_.push_back(c);
      will_write_[c] = true;
    }
  }
  void precopy() {
    // What the result needs and no op writes comes from the input as well.
    for (int c = 0; c < program_.chunks; ++c) {
      if (will_write_[c] || !uses_data() || plan_.output_chunks_[c].offset == kAbsent) continue;
      if (plan_.input_chunks_[c].offset != kAbsent) early_copies_.push_back(c);
    }
    for (int c : early_copies_) {
      if (plan_.input_chunks_[c].offset == kAbsent)
        fail(program_, "reads data[" + std::to_string(c) + "], which nobody wrote");
      Pending pending;
      pending.dst = {BufferId::data, c, 1};
      pending.operands.push_back({{-1, {Memory::input, c}}, pending.dst, 0, 0});
      pending.size_chunk = c;
      pending_.push_back(pending);
      flush(pending_.size() - 1);
    }
  }
  bool uses_data() const { return program_.collective != Collective::all_to_all; }

  Place home(const Region& region) {
    if (region.buffer == BufferId::output) return {Memory::output, region.chunk};
    if (is_data(region) && plan_.output_chunks_[region.chunk].offset != kAbsent) return {Memory::output, region.chunk};
    if (region.buffer == BufferId::input) fail(program_, "writes " + text(region) + ", the caller's input");
    return {Memory::scratch, slot(region)};
  }
  /// Scratch chunks first, then the data chunks that are no part of the output, then what fusing adds. Untouched slots
  /// cost nothing.
  int32_t slot(const Region& region) const {
    return region.buffer == BufferId::scratch ? region.chunk : program_.scratch_chunks + region.chunk;
  }
  Place read_place(const Region& region) {
    if (region.buffer == BufferId::input) return {Memory::input, region.chunk};
    if (!is_data(region)) {
      return home(region);
    }
    if (written_[region.chunk]) return home(region);
    if (plan_.input_chunks_[region.chunk].offset == kAbsent)
      fail(program_, "reads " + text(region) + ", which nobody wrote");
    return {Memory::input, region.chunk};
  }

  // --- ops ---
  void step(const Op& op) {
    switch (op.kind) {
      case OpKind::recv: {
        clobber(op.dst);
        Pending pending{op.dst, {}, op.level, op.size_chunk, false};
        pending.operands.push_back({{op.peer, {}}, op.dst, static_cast<int32_t>(at_), op.level});
        pending_.push_back(std::move(pending));
        break;
      }
      case OpKind::reduce:
        reduce(op);
        break;
      case OpKind::copy:
        copy(op);
        break;
      case OpKind::send:
        send(op);
        break;
    }
  }

  void reduce(const Op& op) {
    Operand operand = take(op);
    flush_readers(op.dst);
    flush_overlaps(op.dst, /*except_equal=*/true);
    const size_t i = find(op.dst);
    if (i == pending_.size()) {
      Pending pending{op.dst, {}, op.level, op.size_chunk, false};
      pending.operands.push_back({{-1, read_place(op.dst)}, op.dst, 0, 0});
      pending_.push_back(std::move(pending));
    }
    Pending& into = pending_[i];
    into.operands.push_back(std::move(operand));
    into.level = std::max({into.level, op.level, into.operands.back().level});
    into.final |= op.final;
  }

  void copy(const Op& op) {
    const size_t i = find(op.src);
    if (i < pending_.size() && dies(op.src) && !overlaps(op.src, op.dst)) {
      Pending moved = std::move(pending_[i]);  // renamed: the value never touches op.src
      pending_.erase(pending_.begin() + static_cast<long>(i));
      clobber(op.dst);
      moved.dst = op.dst;
      moved.level = std::max(moved.level, op.level);
      pending_.push_back(std::move(moved));
      return;
    }
    flush_overlaps(op.src);
    Pending pending{op.dst, {{{-1, read_place(op.src)}, op.src, 0, 0}}, op.level, op.size_chunk, false};
    clobber(op.dst);
    pending_.push_back(std::move(pending));
  }

  void send(const Op& op) {
    flush_overlaps(op.src);
    Destination to;
    to.peer = op.peer;
    if (op.early_write && symmetric_output_ && is_data(op.dst)) to.remote_chunk = op.dst.chunk;
    auto& all = plan_.instructions_;
    // Attach to the instruction that makes (or last sends) this value, if that keeps the order of the pair and the
    // time.
    auto it = emitter_.find(key(op.src));
    if (it != emitter_.end() && all[it->second].level == op.level - 1 &&
        it->second >= last_send_[{op.peer, op.level}]) {
      all[it->second].sends.push_back(to);
      last_send_[{op.peer, op.level}] = it->second;
      return;
    }
    Instruction instruction;
    instruction.level = op.level - 1;
    instruction.size_chunk = op.size_chunk;
    instruction.span = op.src.span;
    instruction.sources.push_back({-1, read_place(op.src)});
    instruction.sends.push_back(to);
    last_send_[{op.peer, op.level}] = static_cast<int32_t>(all.size());
    emitter_[key(op.src)] = static_cast<int32_t>(all.size());
    all.push_back(std::move(instruction));
  }

  /// The operand that a reduce adds: a message that is used nowhere else is added straight from where it arrived.
  Operand take(const Op& op) {
    const size_t i = find(op.src);
    if (i < pending_.size() && pending_[i].operands.size() == 1 && dies(op.src)) {
      Operand operand = pending_[i].operands[0];
      operand.level = pending_[i].level;
      pending_.erase(pending_.begin() + static_cast<long>(i));
      return operand;
    }
    flush_overlaps(op.src);
    return {{-1, read_place(op.src)}, op.src, 0, 0};
  }

  /// True if nobody reads the scratch region again before it is written anew.
  bool dies(const Region& region) const {
    if (region.buffer != BufferId::scratch) return false;
    for (size_t i = at_ + 1; i < ops_.size(); ++i) {
      const Op& op = ops_[i];
      if (op.kind != OpKind::recv && overlaps(op.src, region)) return false;
      if (op.kind == OpKind::reduce && overlaps(op.dst, region)) return false;
      if (op.kind != OpKind::send && op.dst == region) return true;
    }
    return true;
  }

  size_t find(const Region& region) const {
    size_t i = 0;
    while (i < pending_.size() && !(pending_[i].dst == region)) ++i;
    return i;
  }
  static std::tuple<int, int, int> key(const Region& r) { return {static_cast<int>(r.buffer), r.chunk, r.span}; }

  /// Makes way for a new value of `region`: older values that read it are computed now, its own old value is dropped.
  void clobber(const Region& region) {
    flush_readers(region);
    for (size_t i = 0; i < pending_.size();) {
      if (!overlaps(pending_[i].dst, region)) {
        ++i;
      } else {
        flush(i);  // a dropped message must still be taken; liveness removes the store
        i = 0;
      }
    }
    for (auto it = emitter_.begin(); it != emitter_.end();) {
      const auto [buffer, chunk, span] = it->first;
      it = overlaps({static_cast<BufferId>(buffer), chunk, span}, region) ? emitter_.erase(it) : std::next(it);
    }
  }
  void flush_readers(const Region& region) {
    for (size_t i = 0; i < pending_.size();) {
      const bool reads = !(pending_[i].dst == region) &&
                         std::any_of(pending_[i].operands.begin(), pending_[i].operands.end(),
                                     [&](const Operand& o) { return o.source.peer < 0 && overlaps(o.region, region); });
      if (!reads) {
        ++i;
      } else {
        flush(i);
        i = 0;
      }
    }
  }
  void flush_overlaps(const Region& region, bool except_equal = false) {
    for (size_t i = 0; i < pending_.size();) {
      if (overlaps(pending_[i].dst, region) && !(except_equal && pending_[i].dst == region)) {
        flush(i);
        i = 0;
      } else {
        ++i;
      }
    }
  }

  /// Emits pending value i.
  void flush(size_t i, size_t depth = 0) {
    if (depth > ops_.size()) fail(program_, "messages of a pair must be taken in two orders at once");
    // Messages of one pair and level are taken in order: what came before goes first.
    for (bool again = true; again;) {
      again = false;
      for (const Operand& mine : pending_[i].operands) {
        if (mine.source.peer < 0) continue;
        for (size_t j = 0; j < pending_.size() && !again; ++j)
          for (const Operand& other : pending_[j].operands)
            if (j != i && other.source.peer == mine.source.peer && other.level == mine.level &&
                other.order < mine.order) {
              const Region dst = pending_[i].dst;
              flush(j, depth + 1);
              i = find(dst);
              if (i == pending_.size()) return;
              again = true;
              break;
            }
        if (again) break;
      }
    }
    Pending pending = std::move(pending_[i]);
    pending_.erase(pending_.begin() + static_cast<long>(i));
    auto& all = plan_.instructions_;
    for (Operand& operand : pending.operands) {
      if (operand.source.peer < 0 || operand.level == pending.level) continue;
      // Taken at its own level, kept until the others are there.
      Instruction keep;
      keep.level = operand.level;
      keep.size_chunk = pending.size_chunk;
      keep.span = pending.dst.span;
      keep.has_place = true;
      keep.place = {Memory::scratch, plan_.scratch_slots_};
      plan_.scratch_slots_ += pending.dst.span;
      keep.sources.push_back(operand.source);
      operand.source = {-1, keep.place};
      all.push_back(std::move(keep));
    }
    Instruction instruction;
    instruction.level = pending.level;
    instruction.size_chunk = pending.size_chunk;
    instruction.span = pending.dst.span;
    instruction.final = pending.final;
    instruction.has_place = true;
    instruction.place = home(pending.dst);
    for (const Operand& operand : pending.operands) instruction.sources.push_back(operand.source);
    if (is_data(pending.dst))
      for (int c = pending.dst.chunk; c < pending.dst.chunk + pending.dst.span; ++c) written_[c] = true;
    emitter_[key(pending.dst)] = static_cast<int32_t>(all.size());
    all.push_back(std::move(instruction));
  }

  void finish_outputs() {
    if (!uses_data() || program_.collective == Collective::barrier) return;
    for (int c = 0; c < program_.chunks; ++c)
      if (plan_.output_chunks_[c].offset != kAbsent && !written_[c] && plan_.chunks_[c].count > 0)
        fail(program_, "leaves data[" + std::to_string(c) + "] of the result unwritten");
  }

  static bool meet(const Place& a, int span_a, const Place& b, int span_b) {
    return a.memory == b.memory && a.chunk < b.chunk + span_b && b.chunk < a.chunk + span_a;
  }

  /// A store is kept if the result or a later instruction needs it.
  void liveness() {
    auto& all = plan_.instructions_;
    for (size_t i = 0; i < all.size(); ++i) {
      if (!all[i].has_place) continue;
      bool read = false, overwritten = false;
      for (size_t j = i + 1; j < all.size() && !read && !overwritten; ++j) {
        for (const Source& source : all[j].sources)
          read |= source.peer < 0 && meet(source.place, all[j].span, all[i].place, all[i].span);
        overwritten = !read && all[j].has_place && all[j].place == all[i].place && all[j].span >= all[i].span;
      }
      all[i].store = read || (!overwritten && all[i].place.memory == Memory::output);
    }
  }

  void order() {
    auto& all = plan_.instructions_;
    std::vector<int32_t> index(all.size());
    std::iota(index.begin(), index.end(), 0);
    std::stable_sort(index.begin(), index.end(), [&](int32_t a, int32_t b) { return all[a].level < all[b].level; });
    std::vector<Instruction> sorted;
    for (int32_t i : index) sorted.push_back(std::move(all[i]));
    all = std::move(sorted);
    plan_.level_begin_.assign(static_cast<size_t>(plan_.levels_) + 2, 0);
    for (Instruction& instruction : all) {
      ++plan_.level_begin_[static_cast<size_t>(instruction.level) + 1];
      for (Destination& to : instruction.sends) to.record = plan_.messages_++;
    }
    for (size_t l = 1; l < plan_.level_begin_.size(); ++l) plan_.level_begin_[l] += plan_.level_begin_[l - 1];
  }

  void write_after_send() {
    auto& all = plan_.instructions_;
    for (size_t i = 0; i < all.size(); ++i) {
      if (!all[i].has_place) continue;
      for (size_t j = 0; j < i; ++j) {
        if (all[j].sends.empty()) continue;
        const bool from_place = all[j].has_place && meet(all[j].place, all[j].span, all[i].place, all[i].span);
        const bool from_source = all[j].sources.size() == 1 && all[j].sources[0].peer < 0 &&
                                 may_alias(all[j].sources[0].place, all[j].size_chunk, all[j].span, all[i]);
        if (!from_place && !from_source) continue;
        // The peer takes the message at level(j) + 1. Waiting for that here, no later, could be waiting for each other.
        if (all[i].level <= all[j].level + 1)
          for (Destination& to : all[j].sends) to.copied = true;
        else
          all[i].after_sends.push_back(static_cast<int32_t>(j));
      }
    }
  }
  /// In place, the input of a chunk is its output.
  bool may_alias(const Place& source, int32_t size_chunk, int32_t span, const Instruction& writer) const {
    if (meet(source, span, writer.place, writer.span)) return true;
    return source.memory == Memory::input && writer.place.memory == Memory::output &&
           size_chunk < writer.size_chunk + writer.span && writer.size_chunk < size_chunk + span;
  }

  /// Fusing loses no message.
  void check_queues() const {
    std::map<int, int> sends, planned;
    for (const Instruction& instruction : plan_.instructions_)
      for (const Destination& to : instruction.sends) ++planned[to.peer];
    for (const Op& op : ops_)
      if (op.kind == OpKind::send) ++sends[op.peer];
    if (sends != planned) fail(program_, "lost a message while fusing");
  }

  /// Every instruction stays within the chunks that it names; notes which memory the plan needs.
  void check_extents() const {
    for (const Instruction& instruction : plan_.instructions_) {
      for (const Source& source : instruction.sources)
        if (source.peer < 0) check_extent(instruction, source.place);
      if (instruction.has_place) check_extent(instruction, instruction.place);
      for (const Destination& to : instruction.sends)
        if (to.remote_chunk >= 0) check_extent(instruction, {Memory::output, to.remote_chunk});
    }
  }
  void check_extent(const Instruction& instruction, const Place& place) const {
    if (place.memory == Memory::scratch) return;
    const bool output = place.memory == Memory::output;
    const auto& layout = output ? plan_.output_chunks_ : plan_.input_chunks_;
    for (int32_t j = 0; j < instruction.span; ++j) {
      const auto& chunk = layout[static_cast<size_t>(place.chunk + j)];
      const size_t count = plan_.sizes(instruction)[static_cast<size_t>(instruction.size_chunk + j)].count;
      const std::string name = std::string(output ? "output" : "input") + "[" + std::to_string(place.chunk + j) + "]";
      if (chunk.offset == kAbsent) fail(program_, "uses " + name + ", which this rank has not");
      if (chunk.count != count)
        refuse(name + " has " + std::to_string(chunk.count) + " elements, what goes there has " +
               std::to_string(count));
      if (count > 0) (output ? plan_.writes_output_ : plan_.reads_input_) = true;
    }
  }

  const Program& program_;
  const Shape& shape_;
  Plan& plan_;
  std::vector<Op> ops_;
  std::vector<Pending> pending_;
  std::vector<bool> written_, will_write_;
  std::vector<int> early_copies_;
  std::map<std::tuple<int, int, int>, int32_t> emitter_;      // region -> instruction that holds its value
  std::map<std::pair<int32_t, int32_t>, int32_t> last_send_;  // (peer, level) -> last instruction that sends
  size_t at_ = 0;
  bool symmetric_output_ = false;
};

Plan::Plan(const Program& program, const Shape& shape) { PlanBuilder(program, shape, *this).build(); }

size_t Plan::grain() const noexcept { return kLine / element_; }

size_t Plan::part(size_t count, int32_t tile) const noexcept {
  if (tile == 0) return 0;
  if (tile == tiles_) return count;
  return count * static_cast<size_t>(tile) / static_cast<size_t>(tiles_) / grain() * grain();
}

Plan::Extent Plan::extent(const Place& place, int32_t size_chunk) const noexcept {
  // all_to_all: sizes of output chunks are those of output_chunks_.
  const std::vector<Chunk>& layout = place.memory == Memory::output ? output_chunks_ : input_chunks_;
  if (place.memory == Memory::scratch)
    return {static_cast<size_t>(place.chunk) * slot_bytes_, chunks_[static_cast<size_t>(size_chunk)].count};
  const Chunk& chunk = layout[static_cast<size_t>(place.chunk)];
  return {chunk.offset * element_, chunk.count};
}

size_t Plan::offset(const Place& place, int32_t size_chunk, int32_t tile) const noexcept {
  const Extent chunk = extent(place, size_chunk);
  return chunk.offset + part(chunk.count, tile) * element_;
}

const std::vector<Plan::Chunk>& Plan::sizes(const Instruction& instruction) const noexcept {
  // A recv of all_to_all has the size of its output chunk.
  const bool by_output = instruction.has_place && instruction.place.memory == Memory::output;
  return by_output ? output_chunks_ : chunks_;
}

size_t Plan::count(const Instruction& instruction) const noexcept {
  size_t count = 0;
  for (int32_t c = instruction.size_chunk; c < instruction.size_chunk + instruction.span; ++c)
    count += sizes(instruction)[static_cast<size_t>(c)].count;
  return count;
}

size_t Plan::nbytes(const Instruction& instruction, int32_t tile) const noexcept {
  size_t count = 0;
  for (int32_t c = instruction.size_chunk; c < instruction.size_chunk + instruction.span; ++c) {
    const size_t all = sizes(instruction)[static_cast<size_t>(c)].count;
    count += part(all, tile + 1) - part(all, tile);
  }
  return count * element_;
}

std::string Plan::dump() const {
  static const char* const kMemory[] = {"input", "output", "scratch"};
  std::ostringstream out;
  out << "tiles " << tiles_ << " stride " << stride_ << " lag " << lag_ << " levels " << levels_ << " scratch "
      << scratch_slots_ << "\n";
  for (const Instruction& i : instructions_) {
    out << "level " << i.level << " size " << i.size_chunk << ":" << i.size_chunk + i.span << " ";
    if (i.has_place)
      out << (i.store ? "" : "(") << kMemory[static_cast<int>(i.place.memory)] << "[" << i.place.chunk << "]"
          << (i.store ? "" : ")");
    out << " =";
    for (const Source& s : i.sources) {
      if (s.peer >= 0)
        out << " recv " << s.peer;
      else
        out << " " << kMemory[static_cast<int>(s.place.memory)] << "[" << s.place.chunk << "]";
    }
    if (i.final) out << " final";
    for (const Destination& d : i.sends) out << " ->" << d.peer << (d.remote_chunk >= 0 ? "!" : "");
    out << "\n";
  }
  return out.str();
}

}  // namespace paracomm
