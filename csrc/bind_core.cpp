// Errors, element types, build facts.
#include <pybind11/pybind11.h>

#include "convert.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/signature.h"
#include "reduce/reduce.h"
#include "register.h"

namespace py = pybind11;
using namespace paracomm;

namespace {

const char* python_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::peer_lost:
      return "PeerLost";
    case ErrorKind::timeout:
      return "Timeout";
    case ErrorKind::mismatch:
      return "Mismatch";
    case ErrorKind::schedule:
      return "ScheduleError";
    case ErrorKind::invalid_argument:
      return "InvalidArgument";
    case ErrorKind::security:
      return "SecurityError";
    default:
      return "Error";
  }
}

}  // namespace

void register_core(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& error) {
      const py::object type = py::module_::import("paracomm.errors").attr(python_name(error.kind()));
      PyErr_SetObject(type.ptr(), to_str(error.what()).ptr());
    }
  });
  py::dict dtypes, ops, collectives;
  for (int i = 0; i < kDTypes; ++i) dtypes[name_of(static_cast<DType>(i))] = i;
  for (int i = 0; i < kReduceOps; ++i) ops[name_of(static_cast<ReduceOp>(i))] = i;
  for (int i = 0; i <= static_cast<int>(Collective::custom); ++i) collectives[name_of(static_cast<Collective>(i))] = i;
  m.attr("DTYPES") = dtypes;
  m.attr("REDUCE_OPS") = ops;
  m.attr("COLLECTIVES") = collectives;
  m.attr("__version__") = PARACOMM_VERSION;
  m.attr("compiler") = PARACOMM_COMPILER;
  m.def("reduce_isa", &reduce_isa, "The vector instructions that reductions use on this CPU.");
  m.def("limit_reduce_isa", &limit_reduce_isa, py::arg("isa"),
        "Restrict to 'baseline', 'avx2' or 'avx512'; '' lifts it.");
  m.def("item_size", [](int dtype) { return size_of(convert::dtype(dtype)); }, py::arg("dtype"));
}
