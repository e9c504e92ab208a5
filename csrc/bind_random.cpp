// Counter-based random numbers; paracomm.comm.random says what each array is.
#include <pybind11/stl.h>

#include <array>

#include "convert.h"
#include "random/random.h"
#include "register.h"

namespace py = pybind11;
using namespace paracomm;

namespace {

std::array<uint32_t, 4> words(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  std::array<uint32_t, 4> out;
  philox(counter.data(), key.data(), out.data());
  return out;
}

void keep(uint64_t seed, uint32_t stream, uint32_t step, const py::object& bases, const py::object& offsets,
          uint32_t threshold, const py::object& out) {
  const ArrayView rows = convert::dense("bases", bases, DType::int64, false);
  const ArrayView columns = convert::dense("offsets", offsets, DType::int64, false);
  const ArrayView target = convert::dense("out", out, DType::boolean, true);
  if (columns.count == 0 ? target.count != 0
                         : target.count % columns.count != 0 || target.count / columns.count != rows.count)
    throw Error(ErrorKind::invalid_argument, "out must have an element for each base and offset");
  const py::gil_scoped_release release;
  keep_mask({seed, stream, step}, static_cast<const int64_t*>(rows.data), rows.count,
            static_cast<const int64_t*>(columns.data), columns.count, threshold, static_cast<uint8_t*>(target.data));
}

void normal(uint64_t seed, uint32_t stream, uint32_t step, uint64_t first, const py::object& out) {
  const ArrayView target = convert::dense("out", out, DType::float64, true);
  const py::gil_scoped_release release;
  fill_normal({seed, stream, step}, first, target.count, static_cast<double*>(target.data));
}

}  // namespace

void register_random(py::module_& m) {
  m.def("philox", &words, py::arg("counter"), py::arg("key"));
  m.def("keep_mask", &keep, py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("bases"), py::arg("offsets"),
        py::arg("threshold"), py::arg("out"));
  m.def("fill_normal", &normal, py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("first"), py::arg("out"));
}
