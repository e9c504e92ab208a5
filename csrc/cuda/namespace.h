// The sources in this folder are built twice: by nvcc for GPUs, and by the C++ compiler against emulator/. Each build
// has a namespace of its own, so that one program may hold both.
#pragma once

#if defined(PARACOMM_EMULATED)
#define PARACOMM_DEVICE_NAMESPACE emulated
#define PARACOMM_DEVICE_KIND "emulated"
#else
#define PARACOMM_DEVICE_NAMESPACE cuda
#define PARACOMM_DEVICE_KIND "cuda"
#endif
