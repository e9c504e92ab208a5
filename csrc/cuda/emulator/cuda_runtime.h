// Stands in for CUDA's header of this name where device source is built for the emulator; see README.md.
#pragma once

#include "atomics.h"
#include "kernel.h"
#include "runtime_api.h"

using namespace paracomm::emulator::api;
