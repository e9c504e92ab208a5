// Plans: what fuses, and, for every algorithm, that all ranks' plans together run to the end and give the right result
// whatever the order in which ranks get on, and wherever messages lie.
#include "schedule/plan.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <random>

#include "core/limits.h"
#include "programs.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

// --- a model of the executor and the transports, one step at a time ---
/// Where messages lie until they are taken.
enum class Carrier {
  reference,  ///< in the sender's memory (tcp, an arena, threads); what must not is copied
  written,    ///< the same, but results go straight into the peers' outputs
  staged,     ///< in a ring of `lag` and three windows a rank
};

struct Message {
  const std::byte* data = nullptr;
  size_t nbytes = 0;
  int32_t level = 0, tile = 0;
  std::vector<std::byte> copy;
};

struct Pair {
  std::vector<Message> messages;
  size_t taken = 0, released = 0;
};

class Model {
 public:
  Model(const World& world, std::vector<Side>& sides, size_t window_bytes, int32_t lag, Carrier carrier, bool in_place)
      : world_(world),
        sides_(sides),
        carrier_(carrier),
        in_place_(in_place),
        capacity_(static_cast<size_t>(lag + 3) * window_bytes) {
    const auto n = static_cast<size_t>(world.size);
    pairs_.resize(n * n);
    for (size_t r = 0; r < n; ++r) {
      Shape shape = shape_of(sides[r], window_bytes);
      shape.lag = lag;
      plans_.emplace_back(world.programs[r], shape);
      const Plan& plan = plans_.back();
      Rank& rank = ranks_.emplace_back();
      rank.scratch.resize(plan.scratch_bytes());
      const Instruction* const first = plan.instructions().data();
      plan.in_order([&](const Instruction& instruction, int32_t tile) {
        rank.order.push_back({static_cast<int32_t>(&instruction - first), tile});
      });
      CHECK_EQ(rank.order.size(), plan.instructions().size() * static_cast<size_t>(plan.tiles()));
      CHECK_EQ(plan.tiles(), plans_[0].tiles());
    }
  }

  int32_t tiles() const { return plans_[0].tiles(); }
  bool done(size_t r) const { return ranks_[r].at == ranks_[r].order.size(); }

  /// One step of rank r; false: it must wait.
  bool step(size_t r) {
    Rank& rank = ranks_[r];
    const auto [index, tile] = rank.order[rank.at];
    const Instruction& instruction = plans_[r].instructions()[static_cast<size_t>(index)];
    const size_t nbytes = plans_[r].nbytes(instruction, tile);
    if (!rank.waited) {
      if (!earlier_sends_left(r, instruction, tile)) return false;
      rank.waited = true;
    }
    if (rank.srcs.size() < instruction.sources.size()) return take(r, instruction, tile, nbytes);
    if (!rank.computed) return compute(r, instruction, tile, nbytes);
    if (rank.sends < instruction.sends.size()) return send(r, instruction, tile, nbytes);
    rank.waited = rank.computed = false;
    rank.srcs.clear();
    rank.payloads.clear();
    rank.sends = 0;
    ++rank.at;
    return true;
  }

  std::string where(size_t r) const {
    if (done(r)) return "done";
    const auto [index, tile] = ranks_[r].order[ranks_[r].at];
    return "instruction " + std::to_string(index) + " tile " + std::to_string(tile) + " of\n" + plans_[r].dump();
  }

  void check_nothing_is_left() const {
    for (const Pair& pair : pairs_)
      if (pair.released != pair.messages.size()) fail(__FILE__, __LINE__, world_.label() + ": a message was not taken");
  }

 private:
  struct Payload {
    const std::byte* data = nullptr;
    bool by_reference = false, copied = false;
  };
  struct Block {
    size_t nbytes = 0;
    std::vector<std::pair<size_t, size_t>> messages;  // pair, number
  };
  struct Rank {
    std::vector<std::pair<int32_t, int32_t>> order;
    size_t at = 0;
    bool waited = false, computed = false;
    std::vector<const std::byte*> srcs;
    std::vector<Payload> payloads;
    std::vector<std::byte> staged;
    size_t sends = 0;
    std::vector<std::byte> scratch;
    std::map<std::pair<int32_t, int32_t>, size_t> by_reference;  // record, tile -> number
    std::deque<Block> blocks;
  };

  Pair& pair(size_t src, size_t dst) { return pairs_[src * ranks_.size() + dst]; }

  std::byte* address(size_t r, const Place& place, int32_t size_chunk, int32_t tile) {
    const size_t offset = plans_[r].offset(place, size_chunk, tile);
    if (place.memory == Memory::scratch) return ranks_[r].scratch.data() + offset;
    if (place.memory == Memory::output) return reinterpret_cast<std::byte*>(sides_[r].out()) + offset;
    return const_cast<std::byte*>(reinterpret_cast<const std::byte*>(sides_[r].in(in_place_))) + offset;
  }

  bool earlier_sends_left(size_t r, const Instruction& instruction, int32_t tile) {
    for (int32_t earlier : instruction.after_sends)
      for (const Destination& to : plans_[r].instructions()[static_cast<size_t>(earlier)].sends) {
        const auto found = ranks_[r].by_reference.find({to.record, tile});
        if (found != ranks_[r].by_reference.end() && pair(r, static_cast<size_t>(to.peer)).released <= found->second)
          return false;
      }
    return true;
  }

  bool take(size_t r, const Instruction& instruction, int32_t tile, size_t nbytes) {
    const Source& source = instruction.sources[ranks_[r].srcs.size()];
    if (source.peer < 0) {
      ranks_[r].srcs.push_back(address(r, source.place, instruction.size_chunk, tile));
      return true;
    }
    Pair& from = pair(static_cast<size_t>(source.peer), r);
    if (from.taken == from.messages.size()) return false;
    const Message& message = from.messages[from.taken++];
    CHECK_EQ(message.nbytes, nbytes);
    CHECK_EQ(message.level, instruction.level);
    CHECK_EQ(message.tile, tile);
    ranks_[r].srcs.push_back(message.data);
    return true;
  }

  bool reserve(size_t r, size_t nbytes) {
    auto& blocks = ranks_[r].blocks;
    while (!blocks.empty() && std::all_of(blocks.front().messages.begin(), blocks.front().messages.end(),
                                          [&](const auto& m) { return pairs_[m.first].released > m.second; }))
      blocks.pop_front();
    size_t used = 0;
    for (const Block& block : blocks) used += block.nbytes;
    if (used + nbytes > capacity_) return false;
    blocks.push_back({nbytes, {}});
    return true;
  }

  bool compute(size_t r, const Instruction& instruction, int32_t tile, size_t nbytes) {
    Rank& rank = ranks_[r];
    std::byte* const place =
        instruction.has_place ? address(r, instruction.place, instruction.size_chunk, tile) : nullptr;
    std::vector<std::byte*> dsts;
    std::vector<Payload> payloads;
    bool store = instruction.store, reserved = false;
    for (const Destination& to : instruction.sends) {
      const auto peer = static_cast<size_t>(to.peer);
      if (carrier_ == Carrier::written && to.remote_chunk >= 0) {
        const Place there{Memory::output, to.remote_chunk};
        dsts.push_back(reinterpret_cast<std::byte*>(sides_[peer].out()) +
                       plans_[r].offset(there, instruction.size_chunk, tile));
        payloads.push_back({dsts.back(), false, false});
      } else if (carrier_ != Carrier::staged && !to.copied) {
        payloads.push_back({place != nullptr ? place : rank.srcs[0], true, false});
        store |= instruction.has_place;
      } else {
        if (carrier_ == Carrier::staged && !reserved && !reserve(r, nbytes)) return false;
        reserved = true;
        payloads.push_back({nullptr, false, true});
      }
    }
    CHECK(nbytes == 0 || !instruction.sources.empty());
    std::vector<int32_t> value(nbytes / 4);
    for (size_t s = 0; s < rank.srcs.size(); ++s)
      for (size_t i = 0; i < value.size(); ++i) {
        int32_t x;
        std::memcpy(&x, rank.srcs[s] + 4 * i, 4);
        value[i] = static_cast<int32_t>(static_cast<uint32_t>(value[i]) + static_cast<uint32_t>(x));
      }
    if (store) dsts.push_back(place);
    if (nbytes > 0)
      for (std::byte* dst : dsts) std::memcpy(dst, value.data(), nbytes);
    const auto* bytes = reinterpret_cast<const std::byte*>(value.data());
    rank.staged.assign(bytes, bytes + nbytes);
    rank.payloads = std::move(payloads);
    for (const Source& source : instruction.sources)
      if (source.peer >= 0) ++pair(static_cast<size_t>(source.peer), r).released;
    return rank.computed = true;
  }

  bool send(size_t r, const Instruction& instruction, int32_t tile, size_t nbytes) {
    Rank& rank = ranks_[r];
    const Destination& to = instruction.sends[rank.sends];
    Pair& out = pair(r, static_cast<size_t>(to.peer));
    if (out.messages.size() - out.released >= static_cast<size_t>(kQueueDepth)) return false;
    const Payload& payload = rank.payloads[rank.sends++];
    Message message{payload.data, nbytes, instruction.level + 1, tile, {}};
    if (payload.copied) {
      message.copy = rank.staged;
      message.data = message.copy.data();
      if (carrier_ == Carrier::staged)
        rank.blocks.back().messages.emplace_back(r * ranks_.size() + static_cast<size_t>(to.peer), out.messages.size());
    }
    if (payload.by_reference) rank.by_reference[{to.record, tile}] = out.messages.size();
    out.messages.push_back(std::move(message));
    return true;
  }

  const World& world_;
  std::vector<Side>& sides_;
  Carrier carrier_;
  bool in_place_;
  size_t capacity_;
  std::vector<Plan> plans_;
  std::vector<Rank> ranks_;
  std::vector<Pair> pairs_;
};

/// How ranks take turns.
enum class Turns { random, lowest_first, highest_first };

void run_model(const World& world, const std::vector<size_t>& blocks, size_t window_bytes, Carrier carrier, Turns turns,
               bool in_place, std::mt19937& random, int32_t least_tiles) {
  std::vector<Side> sides = make_sides(world, blocks, in_place);
  const auto lag = static_cast<int32_t>(random() % 4 + 1);
  Model model(world, sides, window_bytes, lag, carrier, in_place);
  CHECK(model.tiles() >= least_tiles);
  const auto n = static_cast<size_t>(world.size);
  std::vector<size_t> order(n);
  for (size_t r = 0; r < n; ++r) order[r] = turns == Turns::highest_first ? n - 1 - r : r;
  auto what = [&](size_t r) {
    std::string text = world.label() + ": rank " + std::to_string(r) + " is wrong (carrier " +
                       std::to_string(static_cast<int>(carrier)) + ", turns " +
                       std::to_string(static_cast<int>(turns)) + (in_place ? ", in place" : "") + ", blocks";
    for (size_t count : blocks) text += " " + std::to_string(count);
    return text + ")";
  };
  for (;;) {
    bool moved = false;
    if (turns == Turns::random) std::shuffle(order.begin(), order.end(), random);
    for (size_t r : order) {
      // The first in the order gets as far as it can; in a random one, a random way.
      size_t budget = turns == Turns::random ? random() % 40 + 1 : ~size_t{0};
      bool here = false;
      for (; budget > 0 && !model.done(r) && model.step(r); --budget) here = true;
      moved |= here;
      if (here && turns != Turns::random) break;
    }
    if (std::all_of(order.begin(), order.end(), [&](size_t r) { return model.done(r); })) break;
    if (!moved) {
      std::string text = world.label() + " is stuck:";
      for (size_t r = 0; r < n; ++r) text += "\nrank " + std::to_string(r) + ": " + model.where(r);
      fail(__FILE__, __LINE__, text);
    }
  }
  model.check_nothing_is_left();
  for (size_t r = 0; r < n; ++r)
    if (!is_right(sides[r]))
      fail(__FILE__, __LINE__, what(r) + "\n" + Plan(world.programs[r], shape_of(sides[r], window_bytes)).dump());
}

std::vector<std::vector<size_t>> cases_of(const World& world) {
  const auto n = static_cast<size_t>(world.size);
  if (world.collective() == Collective::barrier) return {{0}};
  if (!world.by_block()) return {{0}, {1}, {n - 1}, {n + 1}, {777}};
  std::vector<size_t> uneven(n, 7);
  uneven[0] = 0;
  uneven[n - 1] = 331;
  return {std::vector<size_t>(n, 0), std::vector<size_t>(n, 1), std::vector<size_t>(n, 65), uneven};
}

void test_all_algorithms(const std::vector<World>& worlds) {
  std::mt19937 random(20240607);
  for (const World& world : worlds) {
    const auto n = static_cast<size_t>(world.size);
    const bool tiled = world.collective() != Collective::barrier;
    // Slices of 1 KiB, chunks of four and a bit.
    const size_t window = 1024 * static_cast<size_t>(std::max(world.programs[0].volume, 1));
    const auto chunks = static_cast<size_t>(world.programs[0].chunks);
    std::vector<size_t> large{chunks * 1100 + 13};
    if (world.by_block()) {
      large.assign(n, chunks / n * 1100);
      large[n / 2] += 13;
    }
    for (const Carrier carrier : {Carrier::reference, Carrier::written, Carrier::staged})
      for (const Turns turns : {Turns::random, Turns::lowest_first, Turns::highest_first})
        for (const bool in_place : {false, true}) {
          if (in_place && !allows_in_place(world.collective())) continue;
          for (const auto& blocks : cases_of(world))
            run_model(world, blocks, 1 << 20, carrier, turns, in_place, random, 1);
          if (tiled) run_model(world, large, window, carrier, turns, in_place, random, 4);
        }
  }
}

// --- what fuses ---
Op send_op(Region src, Region dst, int peer, int level, int size_chunk) {
  Op op;
  op.kind = OpKind::send;
  op.src = src;
  op.dst = dst;
  op.peer = peer;
  op.level = level;
  op.size_chunk = size_chunk;
  return op;
}
Op recv_op(Region dst, int peer, int level, int size_chunk) {
  Op op = send_op(dst, dst, peer, level, size_chunk);
  op.kind = OpKind::recv;
  return op;
}
Op local_op(OpKind kind, Region src, Region dst, int level, int size_chunk) {
  Op op = send_op(src, dst, -1, level, size_chunk);
  op.kind = kind;
  return op;
}

Program program_of(std::vector<Op> ops, int chunks, int scratch_chunks, int rank = 0, int world_size = 3) {
  Program program;
  program.name = "by_hand";
  program.collective = Collective::all_reduce;
  program.rank = rank;
  program.world_size = world_size;
  program.chunks = chunks;
  program.scratch_chunks = scratch_chunks;
  program.volume = 2;
  for (const Op& op : ops) program.levels = std::max(program.levels, op.level);
  program.pair_depth = 1;
  program.ops = std::move(ops);
  return program;
}

Shape floats(size_t count) {
  Shape shape;
  shape.blocks = {count};
  shape.dtype = DType::float32;
  return shape;
}

constexpr Region data0{BufferId::data, 0, 1}, scratch0{BufferId::scratch, 0, 1}, scratch1{BufferId::scratch, 1, 1};

/// Two messages, two reduces, two sends: one instruction.
void test_n_ary_reduce_and_forward() {
  Op last = local_op(OpKind::reduce, scratch1, data0, 1, 0);
  last.final = true;
  const Program program =
      program_of({recv_op(scratch0, 1, 1, 0), local_op(OpKind::reduce, scratch0, data0, 1, 0),
                  recv_op(scratch1, 2, 1, 0), last, send_op(data0, data0, 1, 2, 0), send_op(data0, data0, 2, 2, 0)},
                 1, 2);
  const Plan plan(program, floats(10));
  CHECK_EQ(plan.dump(),
           "tiles 1 stride 1 lag 1 levels 2 scratch 3\n"
           "level 1 size 0:1 output[0] = input[0] recv 1 recv 2 final ->1 ->2\n");
  CHECK_EQ(plan.messages(), 2);
  CHECK_EQ(plan.nbytes(plan.instructions()[0], 0), size_t{40});
}

/// A message that goes on unread is not stored on the way.
void test_forward_without_store() {
  const Program program =
      program_of({recv_op(scratch0, 1, 1, 0), send_op(scratch0, scratch0, 2, 2, 0), recv_op(data0, 2, 3, 0)}, 1, 1);
  CHECK_EQ(Plan(program, floats(3)).dump(),
           "tiles 1 stride 1 lag 1 levels 3 scratch 2\n"
           "level 1 size 0:1 (scratch[0]) = recv 1 ->2\n"
           "level 3 size 0:1 output[0] = recv 2\n");
}

/// What is sent and then overwritten at once must leave as a copy; later than that, the overwriter waits.
void test_write_after_send() {
  const Program soon = program_of({send_op(data0, scratch0, 1, 1, 0), recv_op(data0, 1, 1, 0)}, 1, 1);
  const Plan copied(soon, floats(3));
  CHECK(copied.instructions()[0].sends[0].copied);
  CHECK(copied.instructions()[1].after_sends.empty());
  const Program late = program_of({send_op(data0, scratch0, 1, 1, 0), recv_op(data0, 1, 2, 0)}, 1, 1);
  const Plan waits(late, floats(3));
  CHECK(!waits.instructions()[0].sends[0].copied);
  CHECK_EQ(waits.instructions()[1].after_sends.size(), size_t{1});
}

/// One source in two messages to different ranks, at one time: one instruction.
void test_one_value_to_several_peers() {
  const Program program =
      program_of({send_op(data0, scratch0, 1, 1, 0), send_op(data0, scratch0, 2, 1, 0), recv_op(data0, 1, 2, 0)}, 1, 0);
  CHECK_EQ(Plan(program, floats(3)).dump(),
           "tiles 1 stride 1 lag 1 levels 2 scratch 1\n"
           "level 0 size 0:1  = input[0] ->1 ->2\n"
           "level 2 size 0:1 output[0] = recv 1\n");
}

void test_dumps_of_algorithms(const std::vector<World>& worlds) {
  auto dump = [&](const char* name, int size, size_t rank) {
    return Plan(find_world(worlds, name, size).programs[rank], floats(300)).dump();
  };
  CHECK_EQ(dump("all_reduce.direct", 3, 1),
           "tiles 1 stride 1 lag 1 levels 2 scratch 5\n"
           "level 0 size 2:3  = input[2] ->2\n"
           "level 0 size 0:1  = input[0] ->0\n"
           "level 1 size 1:2 output[1] = input[1] recv 0 recv 2 final ->2! ->0!\n"
           "level 2 size 0:1 output[0] = recv 0\n"
           "level 2 size 2:3 output[2] = recv 2\n");
  // The partial sum that rank 0 passes on is not stored: the result comes back into the same place.
  CHECK_EQ(dump("all_reduce.ring", 3, 0),
           "tiles 1 stride 1 lag 1 levels 4 scratch 5\n"
           "level 0 size 2:3  = input[2] ->1\n"
           "level 1 size 1:2 (output[1]) = input[1] recv 2 ->1\n"
           "level 2 size 0:1 output[0] = input[0] recv 2 final ->1\n"
           "level 3 size 2:3 output[2] = recv 2 ->1\n"
           "level 4 size 1:2 output[1] = recv 2\n");
  CHECK_EQ(dump("all_reduce.one_shot", 3, 0),
           "tiles 1 stride 1 lag 1 levels 1 scratch 4\n"
           "level 0 size 0:1  = input[0] ->1 ->2\n"
           "level 1 size 0:1 output[0] = input[0] recv 1 recv 2 final\n");
  // Rank 1's message arrives a level before it can be added: it is taken at its own level and kept.
  CHECK_EQ(dump("all_reduce.recursive_doubling", 5, 0),
           "tiles 1 stride 1 lag 1 levels 4 scratch 6\n"
           "level 1 size 0:1 output[0] = input[0] recv 4 ->1\n"
           "level 1 size 0:1 scratch[4] = recv 1\n"
           "level 2 size 0:1 output[0] = output[0] scratch[4] ->2\n"
           "level 2 size 0:1 scratch[5] = recv 2\n"
           "level 3 size 0:1 output[0] = output[0] scratch[5] final ->4!\n");
}

// --- tiles ---
void test_tiles_cover_every_element() {
  const Program program = program_of({recv_op(data0, 1, 1, 0)}, 1, 0);
  for (const size_t count : {size_t{0}, size_t{1}, size_t{255}, size_t{256}, size_t{257}, size_t{100003}}) {
    Shape shape = floats(count);
    shape.window_bytes = 2048;  // volume 2: slices of 1 KiB
    const Plan plan(program, shape);
    CHECK_EQ(plan.tiles(), static_cast<int32_t>(std::max<size_t>(1, (count * 4 + 1023) / 1024)));
    const Instruction& instruction = plan.instructions()[0];
    size_t at = 0;
    for (int32_t tile = 0; tile < plan.tiles(); ++tile) {
      CHECK_EQ(plan.offset(instruction.place, 0, tile), at);
      CHECK_EQ(at % 64, size_t{0});
      at += plan.nbytes(instruction, tile);
    }
    CHECK_EQ(at, count * 4);
  }
}

// --- programs that cannot be ---
void test_refused() {
  CHECK_THROWS(Plan(program_of({send_op(data0, data0, 1, 1, 0)}, 1, 0, 1),
                    [] {
                      Shape shape = floats(4);
                      shape.blocks = {1, 1, 1};
                      return shape;
                    }()),
               ErrorKind::schedule, "do not divide into 3 blocks");
  Program deep = program_of({recv_op(data0, 1, 1, 0)}, 1, 0);
  deep.pair_depth = kQueueDepth / 2 + 1;
  CHECK_THROWS(Plan(deep, floats(4)), ErrorKind::schedule, "messages to one peer");
  const Region input0{BufferId::input, 0, 1};
  CHECK_THROWS(Plan(program_of({recv_op(input0, 1, 1, 0)}, 1, 0), floats(4)), ErrorKind::schedule, "caller's input");
  Program bare = program_of({}, 1, 0);
  bare.collective = Collective::broadcast;
  bare.root = 1;
  CHECK_THROWS(Plan(bare, floats(4)), ErrorKind::schedule, "unwritten");
  bare.ops = {send_op(data0, data0, 2, 1, 0)};
  CHECK_THROWS(Plan(bare, floats(4)), ErrorKind::schedule, "reads data[0], which nobody wrote");
}

Shape blocks_of(std::vector<size_t> input, std::vector<size_t> output) {
  Shape shape = floats(4);
  shape.blocks = std::move(input);
  shape.output_blocks = std::move(output);
  return shape;
}

void test_blocks_that_do_not_fit() {
  Program swap = program_of({}, 2, 0);
  swap.collective = Collective::all_to_all;
  swap.ops.resize(1);
  swap.ops[0].src = {BufferId::input, 0, 1};
  swap.ops[0].dst = {BufferId::output, 0, 1};
  Plan(swap, blocks_of({3, 2}, {3, 4}));
  CHECK_THROWS(Plan(swap, blocks_of({3, 2}, {5, 4})), ErrorKind::invalid_argument, "input[0] has 3 elements");
  CHECK_THROWS(Plan(swap, blocks_of({3, 2}, {3})), ErrorKind::invalid_argument, "1 blocks of output, 2 of input");
  for (const size_t count : {size_t{1} << 46, size_t{1} << 62, SIZE_MAX})
    CHECK_THROWS(Plan(swap, blocks_of({count, count}, {})), ErrorKind::invalid_argument, "can address");
}

void test_ranges() {
  Program program = program_of({send_op(data0, data0, 1, 1, 0)}, 1, 0);
  program.world_size = 2;
  check_ranges(program);
  const auto refuses = [&](auto change, const std::string& what) {
    Program other = program;
    change(other);
    CHECK_THROWS(check_ranges(other), ErrorKind::schedule, what);
  };
  refuses([](Program& p) { p.chunks = 0; }, "chunks is 0");
  refuses([](Program& p) { p.chunks = 1 << 30; }, "chunks is 1073741824");
  refuses([](Program& p) { p.levels = -1; }, "levels is -1");
  refuses([](Program& p) { p.root = 2; }, "root is 2");
  refuses([](Program& p) { p.collective = static_cast<Collective>(77); }, "collective is 77");
  refuses([](Program& p) { p.ops[0].kind = static_cast<OpKind>(9); }, "op 0: kind is 9");
  refuses([](Program& p) { p.ops[0].peer = 2; }, "peer is 2");
  refuses([](Program& p) { p.ops[0].peer = 0; }, "peer is 0");
  refuses([](Program& p) { p.ops[0].level = 0; }, "level is 0");
  refuses([](Program& p) { p.ops[0].src.chunk = 1; }, "source is 1");
  refuses([](Program& p) { p.ops[0].src.buffer = static_cast<BufferId>(4); }, "source is 4");
  refuses([](Program& p) { p.ops[0].src.buffer = BufferId::scratch; }, "source");
  refuses([](Program& p) { p.ops[0].dst.span = INT32_MAX; }, "destination is 2147483647");
  refuses([](Program& p) { p.ops[0].size_chunk = 1; }, "size chunk is 1");
}

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  test_n_ary_reduce_and_forward();
  test_forward_without_store();
  test_write_after_send();
  test_one_value_to_several_peers();
  test_tiles_cover_every_element();
  test_refused();
  test_blocks_that_do_not_fit();
  test_ranges();
  test_all_algorithms(worlds);
  test_dumps_of_algorithms(worlds);
}
