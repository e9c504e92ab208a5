// Programs of all algorithms (made by tests/golden/programs/write.py), and what a collective of them must give.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "schedule/plan.h"
#include "schedule/program.h"

namespace paracomm_test {

using namespace paracomm;

/// One schedule: its programs by rank.
struct World {
  std::string name;  ///< "all_reduce.ring"
  int size = 0;
  std::vector<Program> programs;

  Collective collective() const { return programs[0].collective; }
  int root() const { return programs[0].root; }
  bool by_block() const {
    switch (collective()) {
      case Collective::all_gather:
      case Collective::reduce_scatter:
      case Collective::all_to_all:
      case Collective::gather:
      case Collective::scatter:
        return true;
      default:
        return false;
    }
  }
  std::string label() const { return name + " of " + std::to_string(size); }
};

inline Collective collective_named(const std::string& name) {
  for (int c = 0; c <= static_cast<int>(Collective::custom); ++c)
    if (name == name_of(static_cast<Collective>(c))) return static_cast<Collective>(c);
  fail(__FILE__, __LINE__, "no collective is called " + name);
}

inline Program read_program(std::istream& in) {
  Program program;
  std::string collective;
  size_t n_ops = 0;
  in >> collective >> program.name >> program.rank >> program.world_size >> program.root >> program.chunks >>
      program.scratch_chunks >> program.volume >> program.levels >> program.pair_depth >> program.fingerprint >> n_ops;
  program.collective = collective_named(collective);
  for (size_t i = 0; i < n_ops; ++i) {
    Op op;
    int kind = 0, src = 0, dst = 0;
    in >> kind >> src >> op.src.chunk >> op.src.span >> dst >> op.dst.chunk >> op.dst.span >> op.peer >> op.level >>
        op.final >> op.early_write >> op.size_chunk;
    op.kind = static_cast<OpKind>(kind);
    op.src.buffer = static_cast<BufferId>(src);
    op.dst.buffer = static_cast<BufferId>(dst);
    program.ops.push_back(op);
  }
  CHECK(static_cast<bool>(in));
  return program;
}

/// Every world of every algorithm, by name and size.
inline std::vector<World> load_worlds() {
  const auto folder = std::filesystem::path(__FILE__).parent_path().parent_path() / "golden" / "programs";
  std::map<std::pair<std::string, int>, World> found;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".txt") continue;
    std::ifstream in(entry.path());
    for (std::string word; in >> word;) {
      CHECK_EQ(word, "program");
      Program program = read_program(in);
      World& world = found[{entry.path().stem().string(), program.world_size}];
      CHECK_EQ(program.rank, static_cast<int>(world.programs.size()));
      world.name = entry.path().stem().string();
      world.size = program.world_size;
      world.programs.push_back(std::move(program));
    }
  }
  std::vector<World> worlds;
  for (auto& [key, world] : found) worlds.push_back(std::move(world));
  CHECK(!worlds.empty());
  return worlds;
}

inline const World& find_world(const std::vector<World>& worlds, const std::string& name, int size) {
  for (const World& world : worlds)
    if (world.name == name && world.size == size) return world;
  fail(__FILE__, __LINE__, "there is no program of " + name + " for " + std::to_string(size));
}

/// Element i that `rank` brings in.
inline int32_t element(int rank, size_t i) {
  return static_cast<int32_t>((static_cast<size_t>(rank) + 1) * 1'000'003 + i * 7919 + i / 13);
}

/// One rank's side of a collective of int32: what goes in, what must come out.
struct Side {
  std::vector<size_t> blocks, output_blocks;  ///< as in Shape
  size_t largest_chunk = 0;
  std::vector<int32_t> input, output, expected;
  bool has_input = true, has_output = true;

  /// In place where the collective allows it: input and output are then one buffer.
  const int32_t* in(bool in_place) const { return !has_input ? nullptr : in_place ? output.data() : input.data(); }
  int32_t* out() { return has_output ? output.data() : nullptr; }
};

inline bool allows_in_place(Collective collective) {
  return collective == Collective::all_reduce || collective == Collective::reduce ||
         collective == Collective::broadcast;
}

/// Both sides of a call: `blocks` holds {count}, or each rank's block.
inline std::vector<Side> make_sides(const World& world, const std::vector<size_t>& blocks, bool in_place) {
  const auto n = static_cast<size_t>(world.size);
  const Collective collective = world.collective();
  std::vector<size_t> begin{0};
  for (size_t count : blocks) begin.push_back(begin.back() + count);
  std::vector<Side> sides(n);
  for (size_t r = 0; r < n; ++r) {
    const bool is_root = static_cast<int>(r) == world.root();
    const int rank = static_cast<int>(r);
    Side& side = sides[r];
    side.blocks = blocks;
    auto fill = [](std::vector<int32_t>& to, int from, size_t first, size_t count) {
      for (size_t i = 0; i < count; ++i) to.push_back(element(from, first + i));
    };
    auto sums = [&](size_t first, size_t count) {
      for (size_t i = first; i < first + count; ++i) {
        uint32_t sum = 0;
        for (size_t from = 0; from < n; ++from) sum += static_cast<uint32_t>(element(static_cast<int>(from), i));
        side.expected.push_back(static_cast<int32_t>(sum));
      }
    };
    switch (collective) {
      case Collective::all_reduce:
      case Collective::reduce:
        fill(side.input, rank, 0, begin.back());
        side.has_output = collective == Collective::all_reduce || is_root;
        if (side.has_output) sums(0, begin.back());
        break;
      case Collective::broadcast:
        side.has_input = is_root;
        if (is_root) fill(side.input, rank, 0, begin.back());
        fill(side.expected, world.root(), 0, begin.back());
        break;
      case Collective::all_gather:
      case Collective::gather:
        fill(side.input, rank, begin[r], blocks[r]);
        side.has_output = collective == Collective::all_gather || is_root;
        if (side.has_output)
          for (size_t from = 0; from < n; ++from)
            fill(side.expected, static_cast<int>(from), begin[from], blocks[from]);
        break;
      case Collective::reduce_scatter:
        fill(side.input, rank, 0, begin.back());
        sums(begin[r], blocks[r]);
        break;
      case Collective::scatter:
        side.has_input = is_root;
        if (is_root) fill(side.input, rank, 0, begin.back());
        fill(side.expected, world.root(), begin[r], blocks[r]);
        break;
      case Collective::all_to_all: {
        // Rank r sends blocks[(r + p) % n] elements to rank p.
        auto block = [&](size_t from, size_t to) { return blocks[(from + to) % n]; };
        side.blocks.clear();
        for (size_t p = 0; p < n; ++p) {
          side.blocks.push_back(block(r, p));
          side.output_blocks.push_back(block(p, r));
          side.largest_chunk = std::max(side.largest_chunk, blocks[p]);
          fill(side.input, rank, p * 1000, block(r, p));
          fill(side.expected, static_cast<int>(p), r * 1000, block(p, r));
        }
        break;
      }
      default:
        break;
    }
    side.output.assign(side.has_output || in_place ? std::max(side.expected.size(), side.input.size()) : 0, -1);
    if (in_place) std::copy(side.input.begin(), side.input.end(), side.output.begin());
  }
  return sides;
}

inline Shape shape_of(const Side& side, size_t window_bytes) {
  Shape shape;
  shape.blocks = side.blocks;
  shape.output_blocks = side.output_blocks;
  shape.largest_chunk = side.largest_chunk;
  shape.dtype = DType::int32;
  shape.window_bytes = window_bytes;
  return shape;
}

inline bool is_right(const Side& side) {
  return !side.has_output || std::equal(side.expected.begin(), side.expected.end(), side.output.begin());
}

}  // namespace paracomm_test
