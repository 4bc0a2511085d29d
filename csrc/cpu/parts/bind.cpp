// apv_fast._C.dense, elu_backward, onehot_gradient, sample, gumbel and apply_function: what several ops are made of.

#include "../../module.h"
#include "binding.h"
#include "dense.h"
#include "functions.h"
#include "onehot.h"
#include "sample.h"

namespace apv_fast {
namespace {

using Pair = std::array<int64_t, 2>;

const Pass<DenseArguments>& dense_for(Isa isa, const std::string& a, const std::string& b) {
  if ((b == "bfloat16" && a == "float32") || (a == b && (b == "float32" || b == "float64"))) {
    return of_dtype(APV_FAST_PICK(isa, dense), b, "dense");
  }
  throw std::invalid_argument("dense: no product of " + a + " by " + b);
}

void dense_layer(Address a, Pair a_shape, Pair a_strides, const std::string& a_dtype, Address b, Pair b_shape,
                 Pair b_strides, const std::string& b_dtype, Address bias, Address out, int64_t out_stride,
                 Address row_sums, bool elu, int threads) {
  if (a_shape[1] != b_shape[0] || a_shape[0] < 0 || a_shape[1] < 0 || b_shape[1] < 0) {
    throw std::invalid_argument("dense: a must have as many columns as b has rows");
  }
  const Pass<DenseArguments>& layer = dense_for(isa_in_use(), a_dtype, b_dtype);
  if (a_shape[0] == 0 || b_shape[1] == 0) return;
  run(layer, DenseArguments{{pointer(a), a_strides[0], a_strides[1]},
                            {pointer(b), b_strides[0], b_strides[1]},
                            pointer(bias),
                            pointer(out),
                            pointer(row_sums),
                            a_shape[0],
                            b_shape[1],
                            a_shape[1],
                            out_stride,
                            elu,
                            usable_threads(threads)});
}

void elu_gradient(Address grad, Address y, Address out, Address sum, int64_t m, int64_t n, const std::string& dtype,
                  int threads) {
  if (m < 0 || n < 0) throw std::invalid_argument("elu_backward: negative size");
  run(of_dtype(APV_FAST_PICK(isa_in_use(), elu_backward), dtype, "elu_backward"),
      EluBackward{pointer(grad), pointer(y), pointer(out), pointer(sum), m, n, usable_threads(threads)});
}

// `sizes` are B, T, H, S and C.
void gradient_of_onehots(Address grad, Address stoch, Address start, Address first, Address out, int64_t out_stride,
                         const std::array<int64_t, 5>& sizes, const std::string& dtype, int threads) {
  const auto [batch, length, hidden, groups, classes] = sizes;
  if (batch < 0 || length < 0 || hidden < 0 || groups < 1 || classes < 1) {
    throw std::invalid_argument("onehot_gradient: a size is too small");
  }
  run(of_dtype(APV_FAST_PICK(isa_in_use(), onehot_gradient), dtype, "onehot_gradient"),
      OneHotGradient{pointer(grad), pointer<const float*>(stoch), pointer<const float*>(start),
                     pointer<const uint8_t*>(first), pointer(out), batch, length, hidden, groups, classes, out_stride,
                     usable_threads(threads)});
}

void sample_latents(int64_t rows, int64_t stoch, int64_t discrete, double min_std, Address stats, Address noise,
                    Address seed, Address grad, Address out, int threads, const std::string& dtype) {
  require(rows >= 0 && stoch >= 0 && discrete >= 0, "sample: sizes must not be negative");
  SampleProblem p{};
  p.rows = rows, p.stoch = stoch, p.discrete = discrete, p.min_std = min_std;
  p.threads = threads_for(rows * stoch * (discrete + 1), threads);
  p.stats = pointer(stats), p.noise = pointer(noise), p.seed = pointer<const int64_t*>(seed);
  p.grad = pointer(grad), p.out = pointer(out);
  of_dtype(APV_FAST_PICK(isa_in_use(), sample), dtype, "sample")(p);
}

void gumbel_noise(int64_t count, Address seed, Address out, int threads, const std::string& dtype) {
  require(count >= 0, "gumbel: count must not be negative");
  const GumbelProblem p{count, threads_for(count, threads), pointer<const int64_t*>(seed), pointer(out)};
  of_dtype(APV_FAST_PICK(isa_in_use(), draw_gumbel), dtype, "gumbel")(p);
}

void apply(const std::string& name, int64_t count, Address from, Address out, const std::string& dtype) {
  require(count >= 0, "apply_function: count must not be negative");
  const FunctionProblem p{count, name.c_str(), pointer(from), pointer(out)};
  of_dtype(APV_FAST_PICK(isa_in_use(), apply_function), dtype, "apply_function")(p);
}

}  // namespace

void bind_parts(pybind11::module_& module) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> released;
  module.def("dense", &dense_layer, released,
             "Writes f(a @ b + bias) to the address `out`, rows `out_stride` apart, and the sums of a's rows to "
             "`row_sums`; a bias or row_sums of 0 is none, f is ELU or nothing.",
             py::kw_only(), py::arg("a"), py::arg("a_shape"), py::arg("a_strides"), py::arg("a_dtype"), py::arg("b"),
             py::arg("b_shape"), py::arg("b_strides"), py::arg("b_dtype"), py::arg("bias"), py::arg("out"),
             py::arg("out_stride"), py::arg("row_sums"), py::arg("elu"), py::arg("threads"));
  module.def("elu_backward", &elu_gradient, released,
             "Writes grad * elu'(z) [m, n] and its sum over the rows [n], from y = elu(z); all contiguous.",
             py::kw_only(), py::arg("grad"), py::arg("y"), py::arg("out"), py::arg("sum"), py::arg("m"), py::arg("n"),
             py::arg("dtype"), py::arg("threads"));
  module.def("onehot_gradient", &gradient_of_onehots, released,
             "The gradient of a weight that sees one-hot latents, see onehot.h; `sizes` are B, T, H, S, C.",
             py::kw_only(), py::arg("grad"), py::arg("stoch"), py::arg("start"), py::arg("first"), py::arg("out"),
             py::arg("out_stride"), py::arg("sizes"), py::arg("dtype"), py::arg("threads"));
  module.def("sample", &sample_latents, released,
             "Samples of latents [rows, L] or, with the samples' gradient `grad`, the statistics' [rows, M].",
             py::kw_only(), py::arg("rows"), py::arg("stoch"), py::arg("discrete"), py::arg("min_std"),
             py::arg("stats"), py::arg("noise"), py::arg("seed"), py::arg("grad"), py::arg("out"), py::arg("threads"),
             py::arg("dtype"));
  module.def("gumbel", &gumbel_noise, released, "Gumbel noise of the seed at an address, `count` numbers.",
             py::kw_only(), py::arg("count"), py::arg("seed"), py::arg("out"), py::arg("threads"), py::arg("dtype"));
  module.def("apply_function", &apply, released, "One of csrc/cpu/parts/functions.cpp, element by element; for tests.",
             py::kw_only(), py::arg("name"), py::arg("count"), py::arg("from_"), py::arg("out"), py::arg("dtype"));
}

}  // namespace apv_fast
