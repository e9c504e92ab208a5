#include "register.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ core of paracomm. Use the package; this module's interface may change without notice.";
  register_core(m);
  register_comm(m);
  register_device(m);
  register_codec(m);
  register_random(m);
}
