#include "array.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
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
// Version 1.x.
struct DlVersionedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DlVersionedTensor*);
  uint64_t flags;
  DlTensor tensor;
};
constexpr uint64_t kDlReadOnly = 1, kDlIsCopied = 2;

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
  PyObject* parameter_type = nullptr;
  PyObject* no_dispatch = nullptr;
  PyObject* dtypes[kDTypes] = {};
  PyObject *data_ptr, *numel, *dtype, *is_contiguous, *is_cpu, *is_cuda, *is_neg, *layout, *strided;
  PyObject *untyped_storage, *nbytes, *dispatch;
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
  const PyObject* const nn = PyDict_GetItemString(modules, "torch.nn.parameter");
  if (nn == nullptr) return nullptr;  // torch is still being imported
  for (int i = 0; i < kDTypes; ++i) {
    names.dtypes[i] = PyObject_GetAttrString(torch, name_of(static_cast<DType>(i)));
    PyErr_Clear();  // a torch that does not know the dtype has no tensors of it
  }
  names.data_ptr = PyUnicode_InternFromString("data_ptr");
  names.numel = PyUnicode_InternFromString("numel");
  names.dtype = PyUnicode_InternFromString("dtype");
  names.is_contiguous = PyUnicode_InternFromString("is_contiguous");
  names.is_cpu = PyUnicode_InternFromString("is_cpu");
  names.is_cuda = PyUnicode_InternFromString("is_cuda");
  names.is_neg = PyUnicode_InternFromString("is_neg");
  names.layout = PyUnicode_InternFromString("layout");
  names.untyped_storage = PyUnicode_InternFromString("untyped_storage");
  names.nbytes = PyUnicode_InternFromString("nbytes");
  names.dispatch = PyUnicode_InternFromString("__torch_dispatch__");
  names.strided = PyObject_GetAttrString(torch, "strided");
  names.parameter_type = PyObject_GetAttrString(const_cast<PyObject*>(nn), "Parameter");
  names.no_dispatch = PyObject_GetAttrString(PyObject_GetAttrString(torch, "Tensor"), "__torch_dispatch__");
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
      {1, 8, DType::uint8},    {6, 8, DType::boolean},   {1, 16, DType::uint16},  {1, 32, DType::uint32},
      {1, 64, DType::uint64},
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
  view.data = tensor.data == nullptr ? nullptr : static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  view.count = 1;
  int64_t expected = 1;
  if (tensor.ndim < 0 || (tensor.ndim > 0 && tensor.shape == nullptr)) refuse("a DLPack array without a shape");
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] < 0) refuse("a DLPack array of length " + std::to_string(tensor.shape[d]));
    view.count *= static_cast<size_t>(tensor.shape[d]);
    if (tensor.strides != nullptr && tensor.shape[d] > 1) view.contiguous &= tensor.strides[d] == expected;
    expected *= tensor.shape[d];
  }
  if (view.count == 0) view.contiguous = true;
  if (!view.contiguous) {
    const auto item = static_cast<int64_t>(size_of(dtype));
    view.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
    for (int32_t d = 0; d < tensor.ndim; ++d) view.strides.push_back(tensor.strides[d] * item);
  }
  return view;
}

/// The bytes of an array's memory from its first element on: up to the end of its last, or before its first.
struct Extent {
  int64_t begin = 0, end = 0;
};
Extent extent_of(const ArrayView& view) {
  const auto item = static_cast<int64_t>(size_of(view.dtype));
  Extent extent{0, item};
  if (view.contiguous) return {0, static_cast<int64_t>(view.count) * item};
  for (size_t d = 0; d < view.shape.size(); ++d)
    (view.strides[d] < 0 ? extent.begin : extent.end) += (view.shape[d] - 1) * view.strides[d];
  return extent;
}

/// The tensor that was looked into last. Its memory need not be looked into again while it lives, shows the same
/// memory, and its storage lives and has the same size. Weak references: addresses of objects that died come again.
struct Seen {
  py::object tensor, storage;
  const void* data = nullptr;
  size_t count = 0;
  Py_ssize_t nbytes = 0;
};
Seen& last_seen() {
  static thread_local auto* const seen = new Seen;  // a thread may end without the interpreter's lock
  return *seen;
}

py::object call(PyObject* object, PyObject* name) {
  PyObject* const result = PyObject_CallMethodNoArgs(object, name);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

/// What a weak reference refers to, None if that is gone.
py::object referent(const py::object& reference) {
  if (!reference) return py::none();
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(reference.ptr(), &found) < 0) throw py::error_already_set();
  return found == nullptr ? py::object(py::none()) : py::reinterpret_steal<py::object>(found);
#else
  return py::reinterpret_borrow<py::object>(PyWeakref_GetObject(reference.ptr()));
#endif
}
bool refers(const py::object& reference, PyObject* object) { return referent(reference).ptr() == object; }

/// Refuses a tensor whose storage does not hold it, and looks whether torch shows what lies there.
void look_into(PyObject* tensor, const Torch& torch, ArrayView& view) {
  if (view.count == 0) return;
  Seen& seen = last_seen();
  if (seen.data == view.data && seen.count == view.count && view.contiguous && refers(seen.tensor, tensor)) {
    const py::object storage = referent(seen.storage);
    if (!storage.is_none() && PyObject_Size(storage.ptr()) == seen.nbytes) return;
  }
  if (view.data == nullptr) refuse("the tensor has no memory: its storage was freed, or it never had one");
  const py::object storage = call(tensor, torch.untyped_storage);
  const auto* const base = static_cast<const std::byte*>(PyLong_AsVoidPtr(call(storage.ptr(), torch.data_ptr).ptr()));
  const auto nbytes = PyLong_AsSsize_t(call(storage.ptr(), torch.nbytes).ptr());
  const Extent extent = extent_of(view);
  const int64_t offset = static_cast<const std::byte*>(view.data) - base;
  if (base == nullptr || offset + extent.begin < 0 || offset + extent.end > nbytes)
    refuse("the tensor needs bytes " + std::to_string(offset + extent.begin) + " to " +
           std::to_string(offset + extent.end) + " of its storage, which has " + std::to_string(nbytes) +
           ": the storage was resized");
  view.lazy = call(tensor, torch.is_neg).ptr() == Py_True;
  if (!view.lazy && view.contiguous) seen = {py::weakref(tensor), py::weakref(storage), view.data, view.count, nbytes};
}

/// Refuses subclasses that answer for their memory themselves: what lies there is not what they show.
void need_plain(PyObject* tensor, const Torch& torch) {
  const auto type = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  if (type.ptr() == torch.tensor_type || type.ptr() == torch.parameter_type) return;
  const auto dispatch = py::reinterpret_steal<py::object>(PyObject_GetAttr(type.ptr(), torch.dispatch));
  PyErr_Clear();
  if (dispatch.ptr() == torch.no_dispatch) return;
  const auto name = py::str(type.attr("__name__")).cast<std::string>();
  const char* const remedy = name == "DTensor"      ? "pass x.to_local()"
                             : name == "FakeTensor" ? "it has no values"
                                                    : "pass the plain tensor that it wraps";
  refuse("a " + name + ", whose memory is not what it shows: " + remedy);
}

ArrayView view_of_strided_tensor(PyObject* tensor, const Torch& torch) {
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
  const bool on_gpu = attribute(torch.is_cuda).ptr() == Py_True;
  if (!on_gpu && attribute(torch.is_cpu).ptr() != Py_True)
    refuse("tensor on device " + py::str(py::handle(tensor).attr("device")).cast<std::string>() +
           ": collectives take tensors on the CPU and on CUDA devices");
  if (attribute(torch.layout).ptr() != torch.strided)
    refuse("tensor of layout " + py::str(py::handle(tensor).attr("layout")).cast<std::string>() +
           ", expected a dense one");
  if (py::handle(tensor).attr("is_nested").ptr() == Py_True) refuse("a nested tensor, expected a dense one");
  ArrayView view;
  const py::object dtype = attribute(torch.dtype);
  int code = 0;
  while (code < kDTypes && torch.dtypes[code] != dtype.ptr()) ++code;
  if (code == kDTypes) refuse("dtype " + py::str(dtype).cast<std::string>() + " is not one that collectives take");
  view.dtype = static_cast<DType>(code);
  view.count = PyLong_AsSize_t(call(tensor, torch.numel).ptr());
  view.data = PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr());
  view.contiguous = call(tensor, torch.is_contiguous).ptr() == Py_True;
  if (!view.contiguous) {
    view.shape = py::handle(tensor).attr("shape").cast<std::vector<int64_t>>();
    view.strides = py::handle(tensor).attr("stride")().cast<std::vector<int64_t>>();
    for (int64_t& stride : view.strides) stride *= static_cast<int64_t>(size_of(view.dtype));
  }
  if (on_gpu) view.device = py::handle(tensor).attr("device").attr("index").cast<int>();
  if (PyErr_Occurred()) throw py::error_already_set();
  return view;
}

ArrayView view_of_tensor(PyObject* tensor, const Torch& torch) {
  need_plain(tensor, torch);
  ArrayView view = view_of_strided_tensor(tensor, torch);
  look_into(tensor, torch, view);
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
    case 'H':
    case 'I':
    case 'L':
    case 'Q': {
      const DType by_size[] = {DType::uint8, DType::uint16, DType::uint32, DType::uint64};
      return by_size[item == 1 ? 0 : item == 2 ? 1 : item == 4 ? 2 : 3];
    }
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
      {"f8", DType::float64}, {"f4", DType::float32}, {"f2", DType::float16}, {"i8", DType::int64},
      {"i4", DType::int32},   {"i2", DType::int16},   {"i1", DType::int8},    {"u1", DType::uint8},
      {"b1", DType::boolean}, {"u2", DType::uint16},  {"u4", DType::uint32},  {"u8", DType::uint64},
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
  if (!view.contiguous) {
    view.shape.assign(buffer.shape, buffer.shape + buffer.ndim);
    view.strides.assign(buffer.strides, buffer.strides + buffer.ndim);
  }
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
  py::dict arguments;
  if (on_gpu) arguments["stream"] = kLegacyStream;
  py::object capsule;
  try {
    capsule = export_array(**arguments, py::arg("max_version") = py::make_tuple(kDlMajor, 0));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = export_array(**arguments);  // it knows versions 0.x only
  }
  // The capsule owns what it tells, and `object` keeps the memory.
  const bool versioned = PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0;
  void* const managed = PyCapsule_GetPointer(capsule.ptr(), versioned ? "dltensor_versioned" : "dltensor");
  if (managed == nullptr) throw py::error_already_set();
  const uint64_t flags = versioned ? static_cast<DlVersionedTensor*>(managed)->flags : 0;
  if ((flags & kDlIsCopied) != 0) refuse("the array gives a copy of its memory, expected the memory itself");
  const DlTensor& tensor =
      versioned ? static_cast<DlVersionedTensor*>(managed)->tensor : static_cast<DlManagedTensor*>(managed)->tensor;
  const int dtype = dtype_of_dlpack(tensor.dtype);
  if (dtype < 0)
    refuse("DLPack type code " + std::to_string(tensor.dtype.code) + " of " + std::to_string(tensor.dtype.bits) +
           " bits is not one that collectives take");
  ArrayView view = view_of_dltensor(tensor, static_cast<DType>(dtype));
  view.writable = (flags & kDlReadOnly) == 0;
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
  if (!view.contiguous) {
    view.shape = shape.cast<std::vector<int64_t>>();
    view.strides = get("strides").cast<std::vector<int64_t>>();
  }
  view.device = device_of_memory(object, view.data);
  if (const py::object stream = get("stream"); !stream.is_none()) view.stream = stream.cast<uintptr_t>();
  return view;
}

}  // namespace

static ArrayView view_of_any(PyObject* object) {
  const Torch* torch = torch_names();
  if (torch != nullptr) {
    // Not isinstance: the tensor's metaclass would make it a call into Python.
    if (PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(torch->tensor_type)) != 0)
      return view_of_tensor(object, *torch);
  }
  if (std::strcmp(Py_TYPE(object)->tp_name, "numpy.ndarray") != 0 && PyObject_HasAttrString(object, "_baseclass") != 0)
    refuse("a masked array is not one that collectives take");
  if (PyObject_CheckBuffer(object) != 0) return view_of_buffer(object);
  if (PyObject_HasAttrString(object, "__cuda_array_interface__") != 0) return view_of_cuda_array(object);
  if (PyObject_HasAttrString(object, "__dlpack__") != 0) return view_of_dlpack(object);
  refuse(std::string("expected a torch tensor, a NumPy or CuPy array, or an object with __dlpack__ or "
                     "__cuda_array_interface__, got ") +
         Py_TYPE(object)->tp_name);
}

ArrayView view_of(PyObject* object) {
  ArrayView view;
  try {
    view = view_of_any(object);
  } catch (const py::error_already_set& error) {
    // What the array's library says of an array that it cannot show: a dtype without a format, a tensor of functorch.
    if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw;
    refuse(std::string("a ") + Py_TYPE(object)->tp_name +
           " whose memory cannot be reached: " + py::str(error.value()).cast<std::string>());
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {  // pybind11's, of an answer that is not what the protocol says
    refuse(std::string("a ") + Py_TYPE(object)->tp_name + " that describes itself wrongly: " + error.what());
  }
  if (view.data == nullptr && view.count > 0) refuse("the array has no memory");
  return view;
}

bool is_distinct(const ArrayView& view) {
  if (view.contiguous || view.count < 2) return true;
  std::vector<size_t> order(view.shape.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto step = [&](size_t d) { return view.strides[d] < 0 ? -view.strides[d] : view.strides[d]; };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return step(a) < step(b); });
  auto reach = static_cast<int64_t>(size_of(view.dtype));  // bytes that the dimensions so far cover
  bool nested = true;
  for (const size_t d : order) {
    if (view.shape[d] < 2) continue;
    if (step(d) == 0) return false;
    nested &= step(d) >= reach;
    reach += (view.shape[d] - 1) * step(d);
  }
  if (nested) return true;
  // Dimensions that interleave: elements are told apart one by one.
  std::vector<int64_t> offsets{0};
  for (size_t d = 0; d < view.shape.size(); ++d) {
    const size_t n = offsets.size();
    for (int64_t i = 1; i < view.shape[d]; ++i)
      for (size_t j = 0; j < n; ++j) offsets.push_back(offsets[j] + i * view.strides[d]);
  }
  std::sort(offsets.begin(), offsets.end());
  for (size_t i = 1; i < offsets.size(); ++i)
    if (offsets[i] - offsets[i - 1] < static_cast<int64_t>(size_of(view.dtype))) return false;
  return true;
}
