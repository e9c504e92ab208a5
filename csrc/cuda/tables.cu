#include "cuda/tables.h"

#include <algorithm>
#include <map>
#include <string>

#include "core/error.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {
namespace {

constexpr size_t kShortestSlice = 1024;  // Plan's own

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/// Scratch slots that are used, numbered without gaps; neighbours stay neighbours.
class Slots {
 public:
  explicit Slots(const Plan& plan) : number_(static_cast<size_t>(plan.scratch_slots()), 0) {
    for (const paracomm::Instruction& instruction : plan.instructions()) {
      if (instruction.has_place) use(instruction.place, instruction.span);
      for (const Source& source : instruction.sources)
        if (source.peer < 0) use(source.place, instruction.span);
    }
    for (int32_t& number : number_) number = number == 0 ? -1 : used_++;
  }
  int32_t number(int32_t slot) const { return number_[static_cast<size_t>(slot)]; }
  int32_t used() const { return used_; }

 private:
  void use(const Place& place, int32_t span) {
    if (place.memory != Memory::scratch) return;
    for (int32_t c = place.chunk; c < place.chunk + span; ++c) number_[static_cast<size_t>(c)] = 1;
  }
  std::vector<int32_t> number_;
  int32_t used_ = 0;
};

size_t largest_part(const Plan& plan, size_t count) {
  return plan.tiles() == 1 ? count : count / static_cast<size_t>(plan.tiles()) + 1 + plan.grain();
}

/// For one tile; plans of one tile may use several slots as one piece, which then lie as the plan says.
size_t slot_bytes(const Plan& plan) {
  if (plan.tiles() == 1) return plan.slot_bytes();
  size_t most = 0;
  for (const paracomm::Instruction& instruction : plan.instructions())
    most = std::max(most, largest_part(plan, plan.count(instruction)));
  return round_up(most * plan.element_bytes(), kUnit);
}

class Builder {
 public:
  explicit Builder(const Plan& plan) : plan_(plan), slots_(plan) {
    tables_.slot_bytes = slot_bytes(plan);
    tables_.tile_scratch_bytes = round_up(tables_.slot_bytes * static_cast<size_t>(slots_.used()), kUnit);
    for (int32_t level = 0; level <= plan.levels() + 1; ++level) tables_.level_begin.push_back(plan.level_begin(level));
    for (const paracomm::Instruction& instruction : plan.instructions()) add(instruction);
  }
  Tables take() { return std::move(tables_); }

 private:
  void add(const paracomm::Instruction& instruction) {
    Instruction row{};
    row.first_operand = static_cast<int32_t>(tables_.operands.size());
    row.final = instruction.final;
    row.count = plan_.count(instruction);
    for (const Source& source : instruction.sources)
      tables_.operands.push_back(source.peer >= 0 ? message(source.peer) : local(source.place, instruction));
    row.sources = static_cast<int32_t>(instruction.sources.size());
    number_messages(tables_.operands.size() - instruction.sources.size());
    const size_t destinations = tables_.operands.size();
    for (const Destination& to : instruction.sends) tables_.operands.push_back(message(to.peer));
    if (instruction.store) tables_.operands.push_back(local(instruction.place, instruction));
    row.destinations = static_cast<int32_t>(tables_.operands.size() - destinations);
    number_messages(destinations);
    if (std::max(row.sources, row.destinations) > kMaxOperands)
      throw Error(ErrorKind::schedule, "an instruction has " + std::to_string(row.sources) + " sources and " +
                                           std::to_string(row.destinations) + " destinations, a kernel takes " +
                                           std::to_string(kMaxOperands));
    tables_.instructions.push_back(row);
  }

  static Operand message(int32_t peer) { return {Where::message, peer, 0, 1, 0, 0}; }

  Operand local(const Place& place, const paracomm::Instruction& instruction) const {
    const Plan::Extent chunk = plan_.extent(place, instruction.size_chunk);
    if (place.memory == Memory::scratch)
      return {Where::scratch, -1, 0, 0, static_cast<size_t>(slots_.number(place.chunk)) * tables_.slot_bytes, 0};
    return {place.memory == Memory::input ? Where::input : Where::output, -1, 0, 0, chunk.offset, chunk.count};
  }

  /// Operands from `begin` on are one instruction's sources, or its destinations.
  void number_messages(size_t begin) {
    std::map<int32_t, Operand*> latest;
    for (size_t i = begin; i < tables_.operands.size(); ++i) {
      Operand& operand = tables_.operands[i];
      if (operand.where != Where::message) continue;
      Operand*& before = latest[operand.peer];
      if (before != nullptr) {
        operand.ordinal = before->ordinal + 1;
        before->last = 0;
      }
      before = &operand;
    }
  }

  const Plan& plan_;
  Slots slots_;
  Tables tables_;
};

/// What one rank sends to one peer within `lag` + 1 times and may not yet have been taken: see interpreter.cu.
struct UnderWay {
  size_t messages = 0, nbytes = 0;
};

/// Over all peers the most. A time holds several levels: of different tiles, `stride` times apart.
UnderWay most_under_way(const Plan& plan) {
  std::map<int32_t, std::vector<UnderWay>> sent;  // by peer: per level
  for (const paracomm::Instruction& instruction : plan.instructions()) {
    const size_t nbytes = round_up(largest_part(plan, plan.count(instruction)) * plan.element_bytes(), kUnit);
    for (const Destination& to : instruction.sends) {
      auto& levels = sent[to.peer];
      levels.resize(static_cast<size_t>(plan.levels()) + 1);
      UnderWay& level = levels[static_cast<size_t>(instruction.level)];
      ++level.messages;
      level.nbytes += nbytes;
    }
  }
  UnderWay most;
  for (const auto& [peer, levels] : sent) {
    // Time modulo the stride: with many tiles under way, all levels l with lag * l of that remainder coincide.
    const auto stride = static_cast<size_t>(plan.tiles() == 1 ? plan.lag() * (plan.levels() + 1) : plan.stride());
    std::vector<UnderWay> at(stride);
    for (size_t l = 0; l < levels.size(); ++l) {
      UnderWay& time = at[l * static_cast<size_t>(plan.lag()) % stride];
      time.messages += levels[l].messages;
      time.nbytes += levels[l].nbytes;
    }
    for (size_t end = 0; end < stride; ++end) {
      UnderWay window;
      for (size_t back = 0; back <= static_cast<size_t>(plan.lag()); ++back) {
        const UnderWay& time = at[(end + stride * 64 - back) % stride];
        window.messages += time.messages;
        window.nbytes += time.nbytes;
      }
      most.messages = std::max(most.messages, window.messages);
      most.nbytes = std::max(most.nbytes, window.nbytes);
    }
  }
  return most;
}

void check_rings(const Plan& plan, const Layout& layout) {
  size_t longest = 0;
  for (const paracomm::Instruction& instruction : plan.instructions())
    longest = std::max(longest, largest_part(plan, plan.count(instruction)) * plan.element_bytes());
  const UnderWay most = most_under_way(plan);
  // A message that does not fit before the ring's end leaves that end empty: less than one message.
  if (most.messages <= kSlots && most.nbytes + round_up(longest, kUnit) <= layout.ring_bytes) return;
  throw Error(ErrorKind::schedule, "up to " + std::to_string(most.messages) + " messages of " +
                                       std::to_string(most.nbytes) + " bytes in all may be on their way to one peer; " +
                                       "a ring holds " + std::to_string(kSlots) + " and " +
                                       std::to_string(layout.ring_bytes) + " bytes");
}

}  // namespace

size_t window_bytes(const Program& program, const Shape& shape, const Layout& layout, size_t slice_bytes) {
  const size_t depth = static_cast<size_t>(std::max(program.pair_depth, 1));
  const size_t levels = static_cast<size_t>(std::max(program.levels, 1));
  // As in Plan: at one time leave `depth` chunks of each of the levels that coincide; two times, and one message more.
  const size_t stride = std::max<size_t>(1, (levels * depth * 2 + kSlots / 2 - 1) / (kSlots / 2));
  const size_t chunks = depth * ((levels + stride) / stride + 1) * 2 + depth;
  const size_t fits = layout.ring_bytes / chunks;

  const size_t blocks = std::max<size_t>(shape.blocks.size(), 1);
  const size_t each = std::max<size_t>(static_cast<size_t>(program.chunks) / blocks, 1);
  size_t largest = shape.largest_chunk;
  for (const size_t block : shape.blocks) largest = std::max(largest, block);
  const size_t chunk_bytes = largest / each * size_of(shape.dtype);
  const size_t shared = chunk_bytes / static_cast<size_t>(layout.channels);

  size_t slice = std::min({slice_bytes, std::max(shared, kShortestSlice), fits > 3 * kUnit ? fits - 3 * kUnit : 0});
  slice = std::max(slice / kUnit * kUnit, kShortestSlice);
  return slice * static_cast<size_t>(std::max(program.volume, 1));
}

Tables make_tables(const Plan& plan, const Layout& layout) {
  check_rings(plan, layout);
  return Builder(plan).take();
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
