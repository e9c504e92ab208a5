// Counter-based random numbers. Memory is given by address; paracomm.comm.random checks what it is given.
#include <pybind11/stl.h>

#include <array>

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

void keep(uint64_t seed, uint32_t stream, uint32_t step, uintptr_t bases, size_t n_bases, uintptr_t offsets,
          size_t n_offsets, uint32_t threshold, uintptr_t out) {
  const py::gil_scoped_release release;
  keep_mask({seed, stream, step}, reinterpret_cast<const int64_t*>(bases), n_bases,
            reinterpret_cast<const int64_t*>(offsets), n_offsets, threshold, reinterpret_cast<uint8_t*>(out));
}

void normal(uint64_t seed, uint32_t stream, uint32_t step, uint64_t first, size_t count, uintptr_t out) {
  const py::gil_scoped_release release;
  fill_normal({seed, stream, step}, first, count, reinterpret_cast<double*>(out));
}

}  // namespace

void register_random(py::module_& m) {
  m.def("philox", &words, py::arg("counter"), py::arg("key"));
  m.def("keep_mask", &keep, py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("bases"), py::arg("n_bases"),
        py::arg("offsets"), py::arg("n_offsets"), py::arg("threshold"), py::arg("out"));
  m.def("fill_normal", &normal, py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("first"), py::arg("count"),
        py::arg("out"));
}
