// The loops for each instruction set; random.cpp chooses among them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "random/random.h"

namespace paracomm {

struct RandomTable {
  /// Four bytes a block, 0 or 1: the blocks first, first + 1, ...
  void (*keep)(const RandomKey& key, uint64_t first, size_t blocks, uint32_t threshold, uint8_t* out);
  /// Two normals a block.
  void (*normal)(const RandomKey& key, uint64_t first, size_t blocks, double* out);
};

extern const RandomTable kBaselineRandom;
#if defined(__x86_64__)
extern const RandomTable kAvx2Random;
extern const RandomTable kAvx512Random;
#endif

}  // namespace paracomm
