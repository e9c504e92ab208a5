// Limits that rooms agree on.
#pragma once

namespace paracomm {

/// Messages to one peer that may be on their way before the sender waits; plans are checked against it.
inline constexpr int kQueueDepth = 64;

}  // namespace paracomm
