// The codec's loops for any CPU of the kind.
#include "codec/blocks.h"

namespace paracomm {

constinit const CodecTable kBaselineCodec = make_codec();

}  // namespace paracomm
