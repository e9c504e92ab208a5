// One table of loops for each instruction set; reduce.cpp chooses among them.
#pragma once

#include "core/dtype.h"
#include "reduce/reduce.h"

namespace paracomm {

/// loops[dtype][op]; nullptr where the operation has no meaning.
struct ReduceTable {
  ReduceFn loops[kDTypes][kReduceOps];
};

extern const ReduceTable kBaselineLoops;
#if defined(__x86_64__)
extern const ReduceTable kAvx2Loops;
extern const ReduceTable kAvx512Loops;
#endif

}  // namespace paracomm
