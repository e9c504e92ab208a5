#include "reduce/reduce.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "core/error.h"
#include "reduce/table.h"

namespace paracomm {
namespace {

#if defined(__x86_64__)
constexpr size_t kCacheLine = 64;
#endif

struct Path {
  const char* name;
  const ReduceTable* table;
};

constexpr Path kPaths[] = {
    {"baseline", &kBaselineLoops},
#if defined(__x86_64__)
    {"avx2", &kAvx2Loops},
    {"avx512", &kAvx512Loops},
#endif
};
constexpr int kPathCount = sizeof kPaths / sizeof *kPaths;

int best_on_this_cpu() noexcept {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

const int kBest = best_on_this_cpu();
std::atomic<int> limit{kPathCount - 1};

const Path& path() noexcept {
  const int at_most = limit.load(std::memory_order_relaxed);
  return kPaths[at_most < kBest ? at_most : kBest];
}

}  // namespace

ReduceFn select_reduce(DType dtype, ReduceOp op) {
  const auto row = static_cast<size_t>(dtype), column = static_cast<size_t>(op);
  const ReduceFn loop = row < kDTypes && column < kReduceOps ? path().table->loops[row][column] : nullptr;
  if (loop) return loop;
  const char* why = op == ReduceOp::avg ? "; avg needs numbers" : "; band, bor and bxor need integers or bool";
  throw Error(ErrorKind::invalid_argument,
              std::string("reduction ") + name_of(op) + " has no meaning for " + name_of(dtype) + why);
}

void copy_bytes(void* const* dsts, int n_dsts, const void* src, size_t nbytes) {
  if (nbytes == 0) return;
  if (n_dsts == 1) {
    if (dsts[0] != src) std::memcpy(dsts[0], src, nbytes);
    return;
  }
  // Piece by piece, so that src is read from memory once and from the first-level cache for the other destinations.
  constexpr size_t kPiece = 8192;
  for (size_t begin = 0; begin < nbytes; begin += kPiece) {
    const size_t length = nbytes - begin < kPiece ? nbytes - begin : kPiece;
    for (int k = 0; k < n_dsts; ++k)
      if (dsts[k] != src)
        std::memcpy(static_cast<std::byte*>(dsts[k]) + begin, static_cast<const std::byte*>(src) + begin, length);
  }
}

void stream_bytes(void* dst, const void* src, size_t nbytes) {
#if defined(__x86_64__)
  auto* to = static_cast<std::byte*>(dst);
  auto* from = static_cast<const std::byte*>(src);
  const size_t head = -reinterpret_cast<uintptr_t>(to) % kCacheLine;
  if (nbytes >= head + kCacheLine) {
    std::memcpy(to, from, head);
    size_t i = head;
    for (; i + kCacheLine <= nbytes; i += kCacheLine) {
      __m128i line[4];
      std::memcpy(line, from + i, kCacheLine);
      for (int k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i) + k, line[k]);
    }
    std::memcpy(to + i, from + i, nbytes - i);
    _mm_sfence();  // a release store that follows does not order streaming stores
    return;
  }
#endif
  if (nbytes) std::memcpy(dst, src, nbytes);
}

const char* reduce_isa() noexcept { return path().name; }

void limit_reduce_isa(const std::string& isa) {
  if (isa.empty()) return limit.store(kPathCount - 1, std::memory_order_relaxed);
  std::string known;
  for (int i = 0; i < kPathCount; ++i) {
    if (isa == kPaths[i].name) return limit.store(i, std::memory_order_relaxed);
    known += std::string(i ? ", " : "") + kPaths[i].name;
  }
  throw Error(ErrorKind::invalid_argument, "unknown instruction set '" + isa + "'; this build has " + known);
}

}  // namespace paracomm
