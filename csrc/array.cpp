#include "array.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cuda/device.h"

namespace py = pybind11;
using namespace paracomm;

namespace {

// The DLPack ABI (dmlc/dlpack, include/dlpack/dlpack.h, version 0.x), as far as it is needed here.
struct DlDevice {
  int32_t type, id;
};
struct DlType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

// Its table of C functions (version 1.x), which tensor types of torch 2.10 and newer offer: the same answers as from a
// tensor's attributes in 0.1 us instead of 1.
struct DlExchange {
  uint32_t major, minor;
  DlExchange* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DlTensor* out);  // borrows; -1: a Python exception is set
  void* work_stream;
};
constexpr uint32_t kDlMajor = 1;
constexpr int32_t kDlCpu = 1, kDlCuda = 2, kDlCudaManaged = 13;

// cudaStreamLegacy, in CUDA, DLPack and __cuda_array_interface__ alike: the stream that waits for all others.
constexpr uintptr_t kLegacyStream = 1;

[[noreturn]] void refuse(const std::string& what) { throw Error(ErrorKind::invalid_argument, what); }

struct Torch {
  PyObject* tensor_type = nullptr;
  PyObject* dtypes[kDTypes] = {};
  PyObject *data_ptr, *numel, *dtype, *is_contiguous, *is_cpu, *is_cuda, *layout, *strided;
  const DlExchange* exchange = nullptr;
};

/// The table of a tensor type, null where it has none of a version that we know.
const DlExchange* exchange_of(PyObject* tensor_type) {
  const auto capsule =
      py::reinterpret_steal<py::object>(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  const DlExchange* exchange = nullptr;
  if (capsule && PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") != 0)
    exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  PyErr_Clear();
  while (exchange != nullptr && exchange->major != kDlMajor) exchange = exchange->previous;
  return exchange;
}

/// torch's names, once torch is imported; null before that (an array cannot be a tensor then).
const Torch* torch_names() {
  static Torch names;
  if (names.tensor_type != nullptr) return &names;
  PyObject* modules = PyImport_GetModuleDict();
  PyObject* torch = PyDict_GetItemString(modules, "torch");
  if (torch == nullptr || !PyObject_HasAttrString(torch, "Tensor") || !PyObject_HasAttrString(torch, "strided"))
    return nullptr;
  for (int i = 0; i < kDTypes; ++i) names.dtypes[i] = PyObject_GetAttrString(torch, name_of(static_cast<DType>(i)));
  names.data_ptr = PyUnicode_InternFromString("data_ptr");
  names.numel = PyUnicode_InternFromString("numel");
  names.dtype = PyUnicode_InternFromString("dtype");
  names.is_contiguous = PyUnicode_InternFromString("is_contiguous");
  names.is_cpu = PyUnicode_InternFromString("is_cpu");
  names.is_cuda = PyUnicode_InternFromString("is_cuda");
  names.layout = PyUnicode_InternFromString("layout");
  names.strided = PyObject_GetAttrString(torch, "strided");
  names.tensor_type = PyObject_GetAttrString(torch, "Tensor");
  names.exchange = exchange_of(names.tensor_type);
  return &names;
}

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return object;
}

/// The dtype of a DLPack type, -1 if it is not one that collectives take.
int dtype_of_dlpack(DlType type) {
  static constexpr struct {
    uint8_t code, bits;
    DType dtype;
  } kKnown[] = {
      {2, 32, DType::float32}, {4, 16, DType::bfloat16}, {2, 16, DType::float16}, {2, 64, DType::float64},
      {0, 64, DType::int64},   {0, 32, DType::int32},    {0, 16, DType::int16},   {0, 8, DType::int8},
      {1, 8, DType::uint8},    {6, 8, DType::boolean},
  };
  for (const auto& known : kKnown)
    if (type.code == known.code && type.bits == known.bits && type.lanes == 1) return static_cast<int>(known.dtype);
  return -1;
}

bool is_known(DlDevice device) {
  return device.type == kDlCpu || device.type == kDlCuda || device.type == kDlCudaManaged;
}

ArrayView view_of_dltensor(const DlTensor& tensor, DType dtype) {
  ArrayView view;
  if (tensor.device.type != kDlCpu) view.device = tensor.device.id;
  view.dtype = dtype;
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  view.count = 1;
  int64_t expected = 1;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    view.count *= static_cast<size_t>(tensor.shape[d]);
    if (tensor.strides != nullptr && tensor.shape[d] > 1) view.contiguous &= tensor.strides[d] == expected;
    expected *= tensor.shape[d];
  }
  return view;
}

ArrayView view_of_tensor(PyObject* tensor, const Torch& torch) {
  if (torch.exchange != nullptr) {
    DlTensor borrowed;
    if (torch.exchange->tensor_from_object(tensor, &borrowed) != 0) {
      PyErr_Clear();  // the attributes below tell what is wrong with it
    } else if (is_known(borrowed.device)) {
      if (const int dtype = dtype_of_dlpack(borrowed.dtype); dtype >= 0)
        return view_of_dltensor(borrowed, static_cast<DType>(dtype));
    }
  }
  auto attribute = [&](PyObject* name) {
    return py::reinterpret_steal<py::object>(checked(PyObject_GetAttr(tensor, name)));
  };
  auto call = [&](PyObject* name) {
    return py::reinterpret_steal<py::object>(checked(PyObject_CallMethodNoArgs(tensor, name)));
  };
  const bool on_gpu = attribute(torch.is_cuda).ptr() == Py_True;
  if (!on_gpu && attribute(torch.is_cpu).ptr() != Py_True)
    refuse("tensor on device " + py::str(py::handle(tensor).attr("device")).cast<std::string>() +
           ": collectives take tensors on the CPU and on CUDA devices");
  if (attribute(torch.layout).ptr() != torch.strided)
    refuse("tensor of layout " + py::str(py::handle(tensor).attr("layout")).cast<std::string>() +
           ", expected a dense one");
  ArrayView view;
  const py::object dtype = attribute(torch.dtype);
  int code = 0;
  while (code < kDTypes && torch.dtypes[code] != dtype.ptr()) ++code;
  if (code == kDTypes) refuse("dtype " + py::str(dtype).cast<std::string>() + " is not one that collectives take");
  view.dtype = static_cast<DType>(code);
  view.count = PyLong_AsSize_t(call(torch.numel).ptr());
  view.data = PyLong_AsVoidPtr(call(torch.data_ptr).ptr());
  view.contiguous = call(torch.is_contiguous).ptr() == Py_True;
  if (on_gpu) view.device = py::handle(tensor).attr("device").attr("index").cast<int>();
  if (PyErr_Occurred()) throw py::error_already_set();
  return view;
}

DType dtype_of_format(const char* format, size_t item) {
  if (*format == '=' || *format == '<' || *format == '@') ++format;
  switch (*format) {
    case 'd':
      return DType::float64;
    case 'f':
      return DType::float32;
    case 'e':
      return DType::float16;
    case '?':
      return DType::boolean;
    case 'b':
    case 'h':
    case 'i':
    case 'l':
    case 'q': {
      const DType by_size[] = {DType::int8, DType::int16, DType::int32, DType::int64};
      return by_size[item == 1 ? 0 : item == 2 ? 1 : item == 4 ? 2 : 3];
    }
    case 'B':
      return DType::uint8;
    default:
      refuse(std::string("array of format '") + format + "' is not one that collectives take");
  }
}

/// Of an array interface: "<f4".
DType dtype_of_typestr(const std::string& text) {
  const std::string type = text.size() == 3 && text[0] != '>' ? text.substr(1) : "";
  static constexpr struct {
    const char* name;
    DType dtype;
  } kKnown[] = {
      {"f8", DType::float64}, {"f4", DType::float32}, {"f2", DType::float16},
      {"i8", DType::int64},   {"i4", DType::int32},   {"i2", DType::int16},
      {"i1", DType::int8},    {"u1", DType::uint8},   {"b1", DType::boolean},
  };
  for (const auto& known : kKnown)
    if (type == known.name) return known.dtype;
  refuse("array of type '" + text + "' is not one that collectives take");
}

ArrayView view_of_buffer(PyObject* object) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(object, &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) throw py::error_already_set();
  ArrayView view;
  try {
    view.dtype = dtype_of_format(buffer.format != nullptr ? buffer.format : "B", static_cast<size_t>(buffer.itemsize));
  } catch (...) {
    PyBuffer_Release(&buffer);
    throw;
  }
  view.data = buffer.buf;
  view.count = static_cast<size_t>(buffer.len) / static_cast<size_t>(buffer.itemsize);
  view.contiguous = PyBuffer_IsContiguous(&buffer, 'C') != 0;
  view.writable = buffer.readonly == 0;
  PyBuffer_Release(&buffer);
  return view;
}

/// The device that a DLPack array says it is on; the CPU where it does not say.
DlDevice device_of_dlpack(py::handle object) {
  if (!py::hasattr(object, "__dlpack_device__")) return {kDlCpu, 0};
  const auto [type, id] = object.attr("__dlpack_device__")().cast<std::pair<int32_t, int32_t>>();
  return {type, id};
}

ArrayView view_of_dlpack(py::handle object) {
  const DlDevice device = device_of_dlpack(object);
  if (!is_known(device))
    refuse("DLPack array on device type " + std::to_string(device.type) + ", expected the CPU or CUDA");
  const bool on_gpu = device.type != kDlCpu;
  const py::object export_array = object.attr("__dlpack__");
  const py::object capsule = on_gpu ? export_array(py::arg("stream") = kLegacyStream) : export_array();
  auto* managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  const DlTensor& tensor = managed->tensor;  // the capsule still owns it, and `object` keeps the memory
  const int dtype = dtype_of_dlpack(tensor.dtype);
  if (dtype < 0)
    refuse("DLPack type code " + std::to_string(tensor.dtype.code) + " of " + std::to_string(tensor.dtype.bits) +
           " bits is not one that collectives take");
  ArrayView view = view_of_dltensor(tensor, static_cast<DType>(dtype));
  if (on_gpu) {
    view.device = device.id;
    view.stream = kLegacyStream;
  }
  return view;
}

/// The number of the GPU that memory lies on.
int device_of_memory(py::handle object, const void* data) {
  if (py::hasattr(object, "__dlpack_device__")) return device_of_dlpack(object).id;
#if defined(PARACOMM_CUDA)
  return cuda::device_of(data);
#else
  static_cast<void>(data);
  return 0;  // no such array can be used anyway
#endif
}

/// Whether elements of `item` bytes lie back to back; `strides` of an array interface are None then, or bytes.
bool is_dense(const py::sequence& shape, const py::object& strides, size_t item) {
  if (strides.is_none()) return true;
  const auto lengths = shape.cast<std::vector<size_t>>();
  const auto steps = strides.cast<std::vector<int64_t>>();
  auto expected = static_cast<int64_t>(item);
  for (size_t d = lengths.size(); d-- > 0;) {
    if (lengths[d] > 1 && steps[d] != expected) return false;
    expected *= static_cast<int64_t>(lengths[d]);
  }
  return true;
}

/// An array of CuPy, Numba and others: numba.readthedocs.io, "CUDA Array Interface (Version 3)".
ArrayView view_of_cuda_array(py::handle object) {
  const py::dict facts = object.attr("__cuda_array_interface__");
  const auto get = [&](const char* name) -> py::object {
    return facts.contains(name) ? py::object(facts[name]) : py::none();
  };
  if (!get("mask").is_none()) refuse("a masked array is not one that collectives take");
  ArrayView view;
  view.dtype = dtype_of_typestr(get("typestr").cast<std::string>());
  const auto [address, read_only] = get("data").cast<std::pair<uintptr_t, bool>>();
  view.data = reinterpret_cast<void*>(address);
  view.writable = !read_only;
  const py::sequence shape = get("shape");
  view.count = 1;
  for (const py::handle length : shape) view.count *= length.cast<size_t>();
  view.contiguous = view.count == 0 || is_dense(shape, get("strides"), size_of(view.dtype));
  view.device = device_of_memory(object, view.data);
  if (const py::object stream = get("stream"); !stream.is_none()) view.stream = stream.cast<uintptr_t>();
  return view;
}

}  // namespace

ArrayView view_of(PyObject* object) {
  const Torch* torch = torch_names();
  if (torch != nullptr) {
    // Not isinstance: the tensor's metaclass would make it a call into Python.
    if (PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(torch->tensor_type)) != 0)
      return view_of_tensor(object, *torch);
  }
  if (PyObject_CheckBuffer(object) != 0) return view_of_buffer(object);
  if (PyObject_HasAttrString(object, "__cuda_array_interface__") != 0) return view_of_cuda_array(object);
  if (PyObject_HasAttrString(object, "__dlpack__") != 0) return view_of_dlpack(object);
  refuse(std::string("expected a torch tensor, a NumPy or CuPy array, or an object with __dlpack__ or "
                     "__cuda_array_interface__, got ") +
         Py_TYPE(object)->tp_name);
}
