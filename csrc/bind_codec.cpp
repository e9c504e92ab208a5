// Gradients in blocks; paracomm.comm.codec says what each array is.
#include <optional>

#include "codec/codec.h"
#include "convert.h"
#include "register.h"

namespace py = pybind11;
using namespace paracomm;

namespace {

BlockFormat checked(int bits, size_t block) {
  const BlockFormat format{bits, block};
  check_format(format);
  return format;
}

void expect(bool fits, const std::string& what) {
  if (!fits) throw Error(ErrorKind::invalid_argument, what);
}

/// Blocks in a message, all of them whole.
size_t blocks_in(const BlockFormat& format, const ArrayView& message) {
  expect(message.count % block_bytes(format) == 0,
         "a message of " + std::to_string(message.count) + " bytes is not whole blocks");
  return message.count / block_bytes(format);
}

/// Null for None.
float* beside(const char* what, const py::object& array, const ArrayView& x, bool written) {
  if (array.is_none()) return nullptr;
  const ArrayView view = convert::dense(what, array, DType::float32, written);
  expect(view.count == x.count, std::string(what) + " and x differ in length");
  return static_cast<float*>(view.data);
}

void encode(int bits, size_t block, const py::object& x, const py::object& residual, float divisor,
            const py::object& residual_out, const py::object& out) {
  const BlockFormat format = checked(bits, block);
  const ArrayView source = convert::dense("x", x, DType::float32, false);
  const ArrayView target = convert::dense("out", out, DType::uint8, true);
  const size_t blocks = blocks_in(format, target);
  expect(source.count / format.block + (source.count % format.block != 0) <= blocks, "out is too short for x");
  const float* before = beside("residual", residual, source, false);
  float* after = beside("residual_out", residual_out, source, true);
  const py::gil_scoped_release release;
  encode_blocks(format, static_cast<const float*>(source.data), before, divisor, source.count, blocks, after,
                static_cast<uint8_t*>(target.data));
}

void decode(int bits, size_t block, const py::object& data, bool add, const py::object& out) {
  const BlockFormat format = checked(bits, block);
  const ArrayView source = convert::dense("data", data, DType::uint8, false);
  const ArrayView target = convert::dense("out", out, DType::float32, true);
  const size_t blocks = source.count / block_bytes(format);
  expect(target.count / format.block + (target.count % format.block != 0) <= blocks, "data is too short for out");
  const py::gil_scoped_release release;
  decode_blocks(format, static_cast<const uint8_t*>(source.data), target.count, add, static_cast<float*>(target.data));
}

}  // namespace

void register_codec(py::module_& m) {
  m.def(
      "block_bytes", [](int bits, size_t block) { return block_bytes(checked(bits, block)); }, py::arg("bits"),
      py::arg("block"));
  m.def("encode_blocks", &encode, py::arg("bits"), py::arg("block"), py::arg("x"), py::arg("residual"),
        py::arg("divisor"), py::arg("residual_out"), py::arg("out"));
  m.def("decode_blocks", &decode, py::arg("bits"), py::arg("block"), py::arg("data"), py::arg("add"), py::arg("out"));
}
