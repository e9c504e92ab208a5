// What tests do to emulated GPUs: choose an interleaving, let one fail or stall.
#pragma once

#include <cstdint>

namespace paracomm::emulator {

/// From now on launches are disturbed: which threads of a block run first, and where one hands over to the others,
/// follows from `seed`; 0: not disturbed.
void set_seed(uint64_t seed);

/// The device is gone: its kernels end where they wait, and its every call returns cudaErrorLaunchFailure.
void fail_device(int device);
/// While `stalled`, no kernel of the device makes a step.
void stall_device(int device, bool stalled);
/// As if the process had not used the device: no failure, no stall. Nothing of it may be in use.
void reset_device(int device);

/// A block whose threads all wait for others, and see no change for so long, is given up with cudaErrorLaunchTimeout.
void set_patience(double seconds);

}  // namespace paracomm::emulator
