// Devices of communicators: GPUs, and emulated ones.
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>

#include "comm/communicator.h"
#include "convert.h"
#include "cuda/device.h"
#include "register.h"

namespace py = pybind11;
using namespace paracomm;

namespace {

/// What built the code for GPUs, or None.
py::object built_with_cuda() {
#if defined(PARACOMM_CUDA)
  return py::str(PARACOMM_CUDA);
#else
  return py::none();
#endif
}

/// How many GPUs can be used, and why none can.
std::pair<int, std::string> gpus() {
  std::string why;
#if defined(PARACOMM_CUDA)
  const int count = cuda::device_count(&why);
#else
  const int count = 0;
  why = PARACOMM_NO_CUDA;
#endif
  return {count, why};
}

constexpr const char* kRemedy =
    "; install paracomm where nvcc and an NVIDIA driver are (`paracomm doctor` says what it found), or set "
    "PARACOMM_DEVICE=host, which sends what is on GPUs through host memory";

std::shared_ptr<DeviceExecutor> make_gpu([[maybe_unused]] int device, [[maybe_unused]] DeviceHooks hooks) {
  if (const auto [count, why] = gpus(); count == 0)
    throw Error(ErrorKind::invalid_argument, "paracomm can use no GPU here: " + why + kRemedy);
#if defined(PARACOMM_CUDA)
  return cuda::make_device_executor(device, cuda::default_options(), std::move(hooks));
#else
  return nullptr;  // not reached: there are none
#endif
}

std::shared_ptr<DeviceExecutor> make_executor(Communicator& comm, const std::string& kind, int device) {
  if (kind == "cuda") return make_gpu(device, comm.device_hooks());
  if (kind == "emulated")
    return emulated::make_device_executor(device, emulated::default_options(), comm.device_hooks());
  throw Error(ErrorKind::invalid_argument, "kind of device '" + kind + "', expected 'cuda' or 'emulated'");
}

/// The executor calls its communicator until it is closed, so it keeps it. (As a policy of the binding, pybind11 would
/// look for what to keep before it knows that the arguments fit.)
py::object make_device(const std::shared_ptr<Communicator>& comm, const Text& kind, int device) {
  if (!comm) throw Error(ErrorKind::invalid_argument, "a device needs a communicator, got None");
  py::object executor = py::cast(make_executor(*comm, kind.bytes, device));
  py::detail::keep_alive_impl(executor, py::cast(comm));
  return executor;
}

using Item = std::tuple<uintptr_t, size_t, size_t>;

std::shared_ptr<Bucket> make_bucket(DeviceExecutor& executor, const std::vector<Item>& items, int dtype) {
  std::vector<BucketItem> rows;
  for (const auto& [address, count, offset] : items) rows.push_back({reinterpret_cast<void*>(address), count, offset});
  return executor.bucket(rows, convert::dtype(dtype));
}

}  // namespace

void register_device(py::module_& m) {
  m.attr("cuda") = built_with_cuda();
  m.def("gpus", &gpus, "How many GPUs can be used, and if none: why.");
  m.def(
      "emulated_gpus", [] { return emulated::device_count(); },
      "How many GPUs are emulated: PARACOMM_EMULATED_DEVICES.");

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<Bucket, std::shared_ptr<Bucket>>(m, "Bucket", py::is_final(), convert::made_by_the_core());
  py::class_<DeviceExecutor, std::shared_ptr<DeviceExecutor>>(m, "DeviceExecutor", py::is_final(),
                                                              convert::made_by_the_core())
      .def_property_readonly("kind", convert::method(&DeviceExecutor::kind))
      .def_property_readonly("device", convert::method(&DeviceExecutor::device))
      .def("publish", [](DeviceExecutor& executor) { return py::bytes(executor.publish()); })
      .def("connect", convert::method(&DeviceExecutor::connect), py::arg("cards"), nogil)
      .def("join", convert::method(&DeviceExecutor::join), py::arg("work"), py::arg("stream"))
      .def("synchronize", convert::method(&DeviceExecutor::synchronize), py::arg("stream"), nogil)
      .def("bucket", &make_bucket, py::arg("items"), py::arg("dtype"), nogil)
      .def(
          "pack",
          [](DeviceExecutor& executor, const Bucket& bucket, uintptr_t flat, int dtype, double scale,
             uintptr_t stream) {
            executor.pack(bucket, reinterpret_cast<void*>(flat), convert::dtype(dtype), scale, stream);
          },
          py::arg("bucket"), py::arg("flat"), py::arg("dtype"), py::arg("scale"), py::arg("stream"), nogil)
      .def(
          "unpack",
          [](DeviceExecutor& executor, const Bucket& bucket, uintptr_t flat, int dtype, double scale,
             uintptr_t stream) {
            executor.unpack(bucket, reinterpret_cast<const void*>(flat), convert::dtype(dtype), scale, stream);
          },
          py::arg("bucket"), py::arg("flat"), py::arg("dtype"), py::arg("scale"), py::arg("stream"), nogil)
      .def("close", convert::method(&DeviceExecutor::close), nogil);
  m.def("make_device", &make_device, py::arg("comm"), py::arg("kind"), py::arg("device"));
  for (const char* name : {"Bucket", "DeviceExecutor"}) convert::seal(m.attr(name));
}
