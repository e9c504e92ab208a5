// Vectors of the widest kind that the including file is compiled for, for the loops of reduce/ and codec/.
//
// Everything here has internal linkage and uses no standard templates: the linker would merge a shared inline function
// across *_avx2.cpp and *_avx512.cpp, and the baseline could then run instructions that the CPU lacks. Vectors are the
// compilers' own (vector_size), so that a loop means the same, lane by lane, at every width.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paracomm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define PARACOMM_INLINE inline __attribute__((always_inline))

template <class T, int N>
struct PackOf {
  typedef T Type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
struct PackOf<T, 1> {
  using Type = T;
};
/// N lanes of T; one lane is a plain T, so that the same expressions serve the last few elements.
template <class T, int N>
using Pack = typename PackOf<T, N>::Type;

template <class To, class From>
PARACOMM_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class P>
PARACOMM_INLINE P load(const void* from) {
  P pack;
  __builtin_memcpy(&pack, from, sizeof pack);
  return pack;
}

template <class To, int N, class From>
PARACOMM_INLINE Pack<To, N> convert(From from) {
  if constexpr (N == 1)
    return static_cast<To>(from);
  else
    return __builtin_convertvector(from, Pack<To, N>);
}

template <class P>
PARACOMM_INLINE void store(void* to, P pack) {
  __builtin_memcpy(to, &pack, sizeof pack);
}

}  // namespace
}  // namespace paracomm
