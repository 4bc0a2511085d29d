// apv_fast._C.dense, elu_backward and onehot_gradient: dense layers and products of float, double or bfloat16 matrices.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "../../module.h"
#include "dense.h"
#include "onehot.h"
#include "threads.h"
#include "workspace.h"

namespace apv_fast {
namespace {

using Pair = std::array<int64_t, 2>;

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }

const Dense& choose(const DenseFunctions& functions, const std::string& a, const std::string& b) {
  if (b == "float32" && a == "float32") return functions.floats;
  if (b == "float64" && a == "float64") return functions.doubles;
  if (b == "bfloat16" && a == "float32") return functions.halves_of_floats;
  throw std::invalid_argument("dense: no product of " + a + " by " + b);
}

void dense(uintptr_t a, Pair a_shape, Pair a_strides, const std::string& a_dtype, uintptr_t b, Pair b_shape,
           Pair b_strides, const std::string& b_dtype, uintptr_t bias, uintptr_t out, int64_t out_stride,
           uintptr_t row_sums, bool elu, int threads, const std::string& isa) {
  if (a_shape[1] != b_shape[0] || a_shape[0] < 0 || a_shape[1] < 0 || b_shape[1] < 0) {
    throw std::invalid_argument("dense: a must have as many columns as b has rows");
  }
  const DenseFunctions& functions = APV_FAST_PICK(isa_of(isa), dense_functions);
  const Dense& layer = choose(functions, a_dtype, b_dtype);
  if (a_shape[0] == 0 || b_shape[1] == 0) return;
  const DenseArguments arguments{{at(a), a_strides[0], a_strides[1]},
                                 {at(b), b_strides[0], b_strides[1]},
                                 at(bias),
                                 reinterpret_cast<void*>(out),
                                 reinterpret_cast<void*>(row_sums),
                                 a_shape[0],
                                 b_shape[1],
                                 a_shape[1],
                                 out_stride,
                                 elu,
                                 usable_threads(threads)};
  const Workspace workspace(layer.workspace(arguments));
  layer.run(arguments, workspace.data());
}

void elu_backward(uintptr_t grad, uintptr_t y, uintptr_t out, uintptr_t sum, int64_t m, int64_t n,
                  const std::string& dtype, int threads, const std::string& isa) {
  if (m < 0 || n < 0) throw std::invalid_argument("elu_backward: negative size");
  const DenseFunctions& functions = APV_FAST_PICK(isa_of(isa), dense_functions);
  const bool half = dtype == "bfloat16";
  if (!half && dtype != "float32" && dtype != "float64") throw std::invalid_argument("elu_backward: dtype " + dtype);
  const EluGradient& gradient =
      half ? functions.elu_halves : dtype == "float32" ? functions.elu_floats : functions.elu_doubles;
  const EluBackward arguments{at(grad), at(y), reinterpret_cast<void*>(out), reinterpret_cast<void*>(sum), m, n,
                              usable_threads(threads)};
  const Workspace workspace(gradient.workspace(arguments));
  gradient.run(arguments, workspace.data());
}

// `sizes` are B, T, H, S and C.
void onehot_gradient(uintptr_t grad, uintptr_t stoch, uintptr_t start, uintptr_t first, uintptr_t out,
                     int64_t out_stride, const std::array<int64_t, 5>& sizes, const std::string& dtype, int threads,
                     const std::string& isa) {
  const auto [batch, length, hidden, groups, classes] = sizes;
  if (batch < 0 || length < 0 || hidden < 0 || groups < 1 || classes < 1) {
    throw std::invalid_argument("onehot_gradient: a size is too small");
  }
  const OneHotTable& table = APV_FAST_PICK(isa_of(isa), onehot_functions);
  if (dtype != "float32" && dtype != "bfloat16") throw std::invalid_argument("onehot_gradient: dtype " + dtype);
  const OneHotFunctions& functions = dtype == "float32" ? table.floats : table.halves;
  const OneHotGradient arguments{at(grad),
                                 static_cast<const float*>(at(stoch)),
                                 static_cast<const float*>(at(start)),
                                 static_cast<const uint8_t*>(at(first)),
                                 reinterpret_cast<void*>(out),
                                 batch, length, hidden, groups, classes,
                                 out_stride,
                                 usable_threads(threads)};
  const Workspace workspace(functions.workspace(arguments));
  functions.run(arguments, workspace.data());
}

}  // namespace

void bind_dense(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("dense", &dense, py::call_guard<py::gil_scoped_release>(),
             "Writes f(a @ b + bias) to the address `out`, rows `out_stride` apart, and the sums of a's rows to "
             "`row_sums`; a bias or row_sums of 0 is none, f is ELU or nothing.",
             py::kw_only(), py::arg("a"), py::arg("a_shape"), py::arg("a_strides"), py::arg("a_dtype"), py::arg("b"),
             py::arg("b_shape"), py::arg("b_strides"), py::arg("b_dtype"), py::arg("bias"), py::arg("out"),
             py::arg("out_stride"), py::arg("row_sums"), py::arg("elu"), py::arg("threads"), py::arg("isa"));
  module.def("elu_backward", &elu_backward, py::call_guard<py::gil_scoped_release>(),
             "Writes grad * elu'(z) [m, n] and its sum over the rows [n], from y = elu(z); all contiguous.",
             py::kw_only(), py::arg("grad"), py::arg("y"), py::arg("out"), py::arg("sum"), py::arg("m"), py::arg("n"),
             py::arg("dtype"), py::arg("threads"), py::arg("isa"));
  module.def("onehot_gradient", &onehot_gradient, py::call_guard<py::gil_scoped_release>(),
             "The gradient of a weight that sees one-hot latents, see onehot.h; `sizes` are B, T, H, S, C.",
             py::kw_only(), py::arg("grad"), py::arg("stoch"), py::arg("start"), py::arg("first"), py::arg("out"),
             py::arg("out_stride"), py::arg("sizes"), py::arg("dtype"), py::arg("threads"), py::arg("isa"));
}

}  // namespace apv_fast
