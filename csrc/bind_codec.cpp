// Gradients in blocks. Memory is given by address, as everywhere; paracomm.comm.codec checks what it is given.
#include "codec/codec.h"
#include "register.h"

namespace py = pybind11;
using namespace paracomm;

namespace {

BlockFormat checked(int bits, size_t block) {
  const BlockFormat format{bits, block};
  check_format(format);
  return format;
}

void encode(int bits, size_t block, uintptr_t x, uintptr_t residual, float divisor, size_t count, size_t blocks,
            uintptr_t residual_out, uintptr_t out) {
  const BlockFormat format = checked(bits, block);
  const py::gil_scoped_release release;
  encode_blocks(format, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(residual), divisor, count,
                blocks, reinterpret_cast<float*>(residual_out), reinterpret_cast<uint8_t*>(out));
}

void decode(int bits, size_t block, uintptr_t in, size_t count, bool add, uintptr_t out) {
  const BlockFormat format = checked(bits, block);
  const py::gil_scoped_release release;
  decode_blocks(format, reinterpret_cast<const uint8_t*>(in), count, add, reinterpret_cast<float*>(out));
}

}  // namespace

void register_codec(py::module_& m) {
  m.def(
      "block_bytes", [](int bits, size_t block) { return block_bytes(checked(bits, block)); }, py::arg("bits"),
      py::arg("block"));
  m.def("encode_blocks", &encode, py::arg("bits"), py::arg("block"), py::arg("x"), py::arg("residual"),
        py::arg("divisor"), py::arg("count"), py::arg("blocks"), py::arg("residual_out"), py::arg("out"));
  m.def("decode_blocks", &decode, py::arg("bits"), py::arg("block"), py::arg("data"), py::arg("count"), py::arg("add"),
        py::arg("out"));
}
