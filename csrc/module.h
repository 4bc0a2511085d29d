// The parts of the Python module apv_fast._C; each is in its own file.
#pragma once

#include <pybind11/pybind11.h>

namespace apv_fast {

void bind_dense(pybind11::module_& module);
void bind_image_model(pybind11::module_& module);
void bind_imagine(pybind11::module_& module);
void bind_pointwise(pybind11::module_& module);
void bind_scan(pybind11::module_& module);
void bind_step(pybind11::module_& module);

}  // namespace apv_fast
