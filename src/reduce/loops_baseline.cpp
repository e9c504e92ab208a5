// The loops for whatever every CPU of this architecture has (SSE2, NEON).
#include "reduce/loops.h"

namespace paracomm {

constinit const ReduceTable kBaselineLoops = make_table();

}  // namespace paracomm
