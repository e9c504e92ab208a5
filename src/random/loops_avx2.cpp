// The generator's loops for AVX2.
#include "random/loops.h"

namespace paracomm {

constinit const RandomTable kAvx2Random = make_random();

}  // namespace paracomm
