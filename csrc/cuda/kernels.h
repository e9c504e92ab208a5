// The kernels, as the host launches them.
#pragma once

#include <cuda_runtime.h>

#include "core/dtype.h"
#include "cuda/arguments.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {

constexpr int kMaxThreads = 512;

/// `blocks`: channels, at most as many as the layout has and as the plan has tiles.
cudaError_t launch_interpreter(const InterpreterArguments& args, DType dtype, int blocks, int threads,
                               cudaStream_t stream);
cudaError_t launch_shot(const ShotArguments& args, DType dtype, int blocks, int threads, cudaStream_t stream);
cudaError_t launch_drain(const DrainArguments& args, int threads, cudaStream_t stream);

/// The operator as kernels know it: those of bool are bitwise ones.
constexpr ReduceOp device_op(DType dtype, ReduceOp op) {
  if (dtype != DType::boolean) return op;
  if (op == ReduceOp::sum || op == ReduceOp::max) return ReduceOp::bor;
  return op == ReduceOp::prod || op == ReduceOp::min ? ReduceOp::band : op;
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE
