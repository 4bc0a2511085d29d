// apv_fast._C.dense: one dense layer or product of floats.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "bindings.h"
#include "cpu/dense.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

namespace apv_fast {
namespace {

using Pair = std::array<int64_t, 2>;

void dense(uintptr_t a, Pair a_shape, Pair a_strides, uintptr_t b, Pair b_shape, Pair b_strides, uintptr_t bias,
           uintptr_t out, bool elu, int threads, const std::string& isa) {
  if (a_shape[1] != b_shape[0] || a_shape[0] < 0 || a_shape[1] < 0 || b_shape[1] < 0) {
    throw std::invalid_argument("dense: a must have as many columns as b has rows");
  }
  const Dense& layer = APV_FAST_PICK(isa_of(isa), dense_layer);
  if (a_shape[0] == 0 || b_shape[1] == 0) return;
  const DenseArguments arguments{{reinterpret_cast<const float*>(a), a_strides[0], a_strides[1]},
                                 {reinterpret_cast<const float*>(b), b_strides[0], b_strides[1]},
                                 reinterpret_cast<const float*>(bias),
                                 reinterpret_cast<float*>(out),
                                 a_shape[0],
                                 b_shape[1],
                                 a_shape[1],
                                 elu,
                                 usable_threads(threads)};
  const Workspace workspace(layer.workspace(arguments));
  layer.run(arguments, workspace.data());
}

}  // namespace

void bind_dense(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("dense", &dense, py::call_guard<py::gil_scoped_release>(),
             "Writes f(a @ b + bias) to the address `out`, contiguous; a bias of 0 is none, f is ELU or nothing.",
             py::kw_only(), py::arg("a"), py::arg("a_shape"), py::arg("a_strides"), py::arg("b"), py::arg("b_shape"),
             py::arg("b_strides"), py::arg("bias"), py::arg("out"), py::arg("elu"), py::arg("threads"),
             py::arg("isa"));
}

}  // namespace apv_fast
