// What crosses the border between Python and the core, checked: codes, text, and instances that hold something.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <utility>

#include "array.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/signature.h"

/// Text of any bytes. What is no UTF-8 becomes U+FFFD in a str; what a str has and UTF-8 has not, "\udcff".
struct Text {
  std::string bytes;
};

inline pybind11::str to_str(std::string_view bytes) {
  PyObject* text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace");
  if (text == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::str>(text);
}

namespace pybind11::detail {
template <>
struct type_caster<Text> {
  PYBIND11_TYPE_CASTER(Text, const_name("str"));

  bool load(handle source, bool /*convert*/) {
    if (!PyUnicode_Check(source.ptr())) return false;
    const auto encoded =
        reinterpret_steal<object>(PyUnicode_AsEncodedString(source.ptr(), "utf-8", "backslashreplace"));
    if (!encoded) throw error_already_set();
    value.bytes.assign(PyBytes_AS_STRING(encoded.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(encoded.ptr())));
    return true;
  }
  static handle cast(const Text& text, return_value_policy, handle) { return to_str(text.bytes).release(); }
};
}  // namespace pybind11::detail

namespace convert {

template <class Enum>
Enum code(const char* what, int value, int count) {
  if (value < 0 || value >= count)
    throw paracomm::Error(paracomm::ErrorKind::invalid_argument, std::string(what) + " " + std::to_string(value) +
                                                                     ", expected 0 to " + std::to_string(count - 1));
  return static_cast<Enum>(value);
}
inline paracomm::DType dtype(int value) { return code<paracomm::DType>("dtype", value, paracomm::kDTypes); }
inline paracomm::ReduceOp reduce_op(int value) {
  return code<paracomm::ReduceOp>("reduction", value, paracomm::kReduceOps);
}
inline paracomm::Collective collective(int value) {
  return code<paracomm::Collective>("collective", value, static_cast<int>(paracomm::Collective::custom) + 1);
}

/// A method as a function of a reference: bound as it is, pybind11 would take None for self, and the method a null
/// pointer.
template <class Result, class Class, class... Arguments>
auto method(Result (Class::*function)(Arguments...)) {
  return [function](Class& self, Arguments... arguments) -> Result {
    return (self.*function)(std::forward<Arguments>(arguments)...);
  };
}
template <class Result, class Class, class... Arguments>
auto method(Result (Class::*function)(Arguments...) const) {
  return [function](const Class& self, Arguments... arguments) -> Result {
    return (self.*function)(std::forward<Arguments>(arguments)...);
  };
}

/// Dense memory of the host with elements of one type; `array` must outlive the view.
inline ArrayView dense(const char* what, pybind11::handle array, paracomm::DType dtype, bool written) {
  const ArrayView view = view_of(array.ptr());
  if (view.device == ArrayView::kHost && view.contiguous && view.dtype == dtype && (view.writable || !written))
    return view;
  throw paracomm::Error(paracomm::ErrorKind::invalid_argument, std::string(what) + " must be contiguous " +
                                                                   paracomm::name_of(dtype) + " in host memory" +
                                                                   (written ? ", writable" : ""));
}

/// For classes without a constructor. An instance that `cls.__new__(cls)` made would hold nothing, and its methods
/// would read what is not there.
inline pybind11::custom_type_setup made_by_the_core() {
  return pybind11::custom_type_setup([](PyHeapTypeObject* type) {
    type->ht_type.tp_new = [](PyTypeObject* made, PyObject*, PyObject*) -> PyObject* {
      PyErr_Format(PyExc_TypeError, "instances of %s are made by paracomm alone", made->tp_name);
      return nullptr;
    };
  });
}

/// For classes with one: `__new__` runs it, and pybind11 ignores the second call.
inline pybind11::custom_type_setup constructed_at_once() {
  return pybind11::custom_type_setup([](PyHeapTypeObject* type) {
    type->ht_type.tp_new = [](PyTypeObject* made, PyObject* args, PyObject* kwargs) -> PyObject* {
      PyObject* self = pybind11::detail::make_new_instance(made);
      if (self == nullptr) return nullptr;
      if (made->tp_init(self, args, kwargs) == 0) return self;
      Py_DECREF(self);
      return nullptr;
    };
  });
}

/// The last word on a class: no instance changes into one (`x.__class__ = cls`).
inline void seal(const pybind11::object& cls) {
  reinterpret_cast<PyTypeObject*>(cls.ptr())->tp_flags |= Py_TPFLAGS_IMMUTABLETYPE;
  PyType_Modified(reinterpret_cast<PyTypeObject*>(cls.ptr()));
}

}  // namespace convert
