// A kernel launch, in two versions: for a GPU and for the emulator.
#pragma once

#include <cuda_runtime.h>

#include "cuda/namespace.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

template <class Args>
cudaError_t launch(void (*kernel)(Args), int blocks, int threads, cudaStream_t stream, const Args& args) {
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
#if defined(PARACOMM_EMULATED)
  return emulator::launch(kernel, grid, block, 0, stream, args);
#else
  kernel<<<grid, block, 0, stream>>>(args);
  return cudaGetLastError();
#endif
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
