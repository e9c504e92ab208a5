// Memory of torch tensors, NumPy arrays and whatever speaks DLPack, without linking to any of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

#include "core/dtype.h"

struct ArrayView {
  void* data = nullptr;
  size_t count = 0;
  paracomm::DType dtype = paracomm::DType::uint8;
  bool contiguous = true;
  bool writable = true;
};

/// Throws Error(invalid_argument) for what is no array on the CPU, or has a dtype that no collective takes.
ArrayView view_of(PyObject* object);
