// The rooms of the extension; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

void register_core(pybind11::module_& m);
void register_comm(pybind11::module_& m);
void register_device(pybind11::module_& m);
void register_codec(pybind11::module_& m);
void register_random(pybind11::module_& m);
