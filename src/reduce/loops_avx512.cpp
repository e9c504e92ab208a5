// The loops for AVX-512 F, BW, DQ and VL.
#include "reduce/loops.h"

namespace paracomm {

constinit const ReduceTable kAvx512Loops = make_table();

}  // namespace paracomm
