// The loops for AVX2 and F16C.
#include "reduce/loops.h"

namespace paracomm {

constinit const ReduceTable kAvx2Loops = make_table();

}  // namespace paracomm
