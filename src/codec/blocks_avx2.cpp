// The codec's loops for AVX2.
#include "codec/blocks.h"

namespace paracomm {

constinit const CodecTable kAvx2Codec = make_codec();

}  // namespace paracomm
