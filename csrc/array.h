// Memory of torch tensors, NumPy and CuPy arrays, and whatever speaks DLPack or has a __cuda_array_interface__, on the
// CPU or a GPU, without linking to any of them: the one gate that decides what memory an array really has.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dtype.h"

struct ArrayView {
  void* data = nullptr;
  size_t count = 0;
  paracomm::DType dtype = paracomm::DType::uint8;
  bool contiguous = true;
  bool writable = true;
  bool lazy = false;  ///< torch shows the negative of what lies in memory
  /// Of an array that is not contiguous; strides in bytes.
  std::vector<int64_t> shape, strides;
  int device = kHost;             ///< number of the GPU, as CUDA counts in this process
  uintptr_t stream = kAnyStream;  ///< on a GPU: the data are ready for what this stream does

  static constexpr int kHost = -1;
  static constexpr uintptr_t kAnyStream = ~uintptr_t{0};  ///< the array names none: its library's current one
};

/// Throws Error(invalid_argument) for what is no array on the CPU or a GPU, has a dtype that no collective takes, or
/// has no memory of its own that holds what it shows: wrappers with a __torch_dispatch__, freed storage.
ArrayView view_of(PyObject* object);

/// Whether no two elements share memory.
bool is_distinct(const ArrayView& view);
