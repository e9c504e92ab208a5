// The codec's loops for AVX-512 F, BW, DQ and VL.
#include "codec/blocks.h"

namespace paracomm {

constinit const CodecTable kAvx512Codec = make_codec();

}  // namespace paracomm
