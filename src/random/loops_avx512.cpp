// The generator's loops for AVX-512.
#include "random/loops.h"

namespace paracomm {

constinit const RandomTable kAvx512Random = make_random();

}  // namespace paracomm
