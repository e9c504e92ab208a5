// The floor of a collective on one host: the least traffic, by one thread a rank over mapped buffers.
//
// Every input is read once and every output written once, and nothing else moves; each rank serves one slice. What a
// real collective adds to it is staging, waiting and copies. Two sets of buffers rotate, so that sizes past the cache
// stay there.
//
//   floor RANKS [SIZES]     SIZES in bytes, "262144,1048576"; prints one line a size of the all-reduce
//   floor RANKS --serve     reads lines "COLLECTIVE BYTES ITERATIONS", answers each with the seconds of every iteration
// Build: g++ -O3 -march=native -std=c++20 -pthread floor.cpp -o floor
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

class Mapped {
 public:
  explicit Mapped(size_t count) : nbytes_(std::max<size_t>(count, 1) * sizeof(float)) {
    void* p = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<float*>(p);
    std::memset(p, 0, nbytes_);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() { munmap(data_, nbytes_); }
  float* data() const { return data_; }
  size_t count() const { return nbytes_ / sizeof(float); }

 private:
  size_t nbytes_;
  float* data_;
};

/// dsts = sum of srcs over `count` elements: one pass, whatever the collective.
struct Move {
  std::vector<const float*> srcs;
  std::vector<float*> dsts;
  size_t count;
};

constexpr int kLanes = 8, kMostRanks = 64;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

void run(const Move& move) {
  const size_t whole = move.count / kLanes * kLanes;
  const float* srcs[kMostRanks];
  float* dsts[kMostRanks];
  std::copy(move.srcs.begin(), move.srcs.end(), srcs);
  std::copy(move.dsts.begin(), move.dsts.end(), dsts);
  const size_t sources = move.srcs.size(), targets = move.dsts.size();
  for (size_t i = 0; i < whole; i += kLanes) {
    auto sum = *reinterpret_cast<const Vector*>(srcs[0] + i);
    for (size_t j = 1; j < sources; ++j) sum += *reinterpret_cast<const Vector*>(srcs[j] + i);
    for (size_t k = 0; k < targets; ++k) *reinterpret_cast<Vector*>(dsts[k] + i) = sum;
  }
  for (size_t i = whole; i < move.count; ++i) {
    float sum = move.srcs[0][i];
    for (size_t j = 1; j < move.srcs.size(); ++j) sum += move.srcs[j][i];
    for (float* dst : move.dsts) dst[i] = sum;
  }
}

/// One rank's input and output; one and the same where the collective works in place.
struct Set {
  std::vector<std::unique_ptr<Mapped>> inputs, outputs;
  float* in(int rank) const { return inputs[rank]->data(); }
  float* out(int rank) const { return (outputs.empty() ? inputs : outputs)[rank]->data(); }
};

/// What `rank`'s thread does for `collective` of `count` elements (nccl-tests' count: the larger of input and output).
std::vector<Move> moves_of(const std::string& collective, int rank, int ranks, size_t count, const Set& set) {
  const size_t align = 16;  // slices begin at cache lines
  const size_t begin = count * rank / ranks / align * align;
  const size_t end = rank + 1 == ranks ? count : count * (rank + 1) / ranks / align * align;
  const size_t share = count / ranks;
  Move move{{}, {}, end - begin};
  std::vector<Move> moves;
  for (int peer = 0; peer < ranks; ++peer) {
    if (collective == "all_reduce" || collective == "reduce") move.srcs.push_back(set.in(peer) + begin);
    if (collective == "all_reduce") move.dsts.push_back(set.out(peer) + begin);
    if (collective == "broadcast" && peer != 0) move.dsts.push_back(set.out(peer) + begin);
    if (collective == "reduce_scatter") move.srcs.push_back(set.in(peer) + rank * share);
    if (collective == "all_gather") move.dsts.push_back(set.out(peer) + rank * share);
    if (collective == "all_to_all")
      moves.push_back({{set.in(peer) + rank * share}, {set.out(rank) + peer * share}, share});
  }
  if (collective == "reduce") move.dsts = {set.out(0) + begin};
  if (collective == "broadcast") move.srcs = {set.in(0) + begin};
  if (collective == "reduce_scatter") move.dsts = {set.out(rank)}, move.count = share;
  if (collective == "all_gather") move.srcs = {set.in(rank)}, move.count = share;
  if (collective == "gather") move = {{set.in(rank)}, {set.out(0) + rank * share}, share};
  if (collective == "scatter") move = {{set.in(0) + rank * share}, {set.out(rank)}, share};
  if (collective != "all_to_all") moves.push_back(move);
  return moves;
}

Set make_set(const std::string& collective, int ranks, size_t count) {
  const bool in_place = collective == "all_reduce" || collective == "reduce" || collective == "broadcast";
  Set set;
  for (int rank = 0; rank < ranks; ++rank) {
    set.inputs.push_back(std::make_unique<Mapped>(count));
    if (!in_place) set.outputs.push_back(std::make_unique<Mapped>(count));
  }
  return set;
}

/// Seconds of each iteration, from the moment that all ranks have met until all are done.
std::vector<double> measure(const std::string& collective, int ranks, size_t nbytes, size_t iterations) {
  const size_t count = nbytes / sizeof(float);
  const Set sets[2] = {make_set(collective, ranks, count), make_set(collective, ranks, count)};
  std::vector<double> seconds;
  std::barrier meet(ranks);
  auto rank_main = [&](int rank) {
    const std::vector<Move> moves[2] = {moves_of(collective, rank, ranks, count, sets[0]),
                                        moves_of(collective, rank, ranks, count, sets[1])};
    for (size_t i = 0; i < iterations; ++i) {
      const Set& set = sets[i % 2];  // written anew by its own rank, as a caller's buffers are
      if (!set.outputs.empty()) std::fill_n(set.out(rank), set.outputs[rank]->count(), 0.0f);
      std::fill_n(set.in(rank), set.inputs[rank]->count(), 1.0f);
      meet.arrive_and_wait();
      const auto start = Clock::now();
      for (const Move& move : moves[i % 2]) run(move);
      meet.arrive_and_wait();
      if (rank == 0) seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(rank_main, rank);
  for (auto& thread : threads) thread.join();
  return seconds;
}

void print_table(int ranks, const std::string& sizes) {
  std::istringstream list(sizes);
  for (std::string word; std::getline(list, word, ',');) {
    const size_t nbytes = std::stoull(word);
    auto seconds = measure("all_reduce", ranks, nbytes, std::max<size_t>(9, 300'000'000 / nbytes));
    std::sort(seconds.begin(), seconds.end());
    const double t = seconds[seconds.size() / 2];
    std::printf("%12zu %12.1f us  algbw %7.3f GB/s busbw %7.3f\n", nbytes, t * 1e6, nbytes / t / 1e9,
                2.0 * (ranks - 1) / ranks * nbytes / t / 1e9);
  }
}

void serve(int ranks) {
  std::string collective;
  size_t nbytes = 0, iterations = 0;
  while (std::cin >> collective >> nbytes >> iterations) {
    for (double seconds : measure(collective, ranks, nbytes, iterations)) std::printf("%.9f ", seconds);
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 2;
  const std::string what = argc > 2 ? argv[2] : "262144,1048576,4194304,16777216,67108864";
  if (ranks < 1 || ranks > kMostRanks) {
    std::fprintf(stderr, "usage: floor RANKS [SIZES | --serve], RANKS from 1 to %d\n", kMostRanks);
    return 2;
  }
  if (what == "--serve") {
    serve(ranks);
  } else {
    print_table(ranks, what);
  }
}
