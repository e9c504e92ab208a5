// The generator's loops for any CPU of the kind.
#include "random/loops.h"

namespace paracomm {

constinit const RandomTable kBaselineRandom = make_random();

}  // namespace paracomm
