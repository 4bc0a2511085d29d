// apv_fast._C.sample, gumbel, kl_loss, image, lambda_return, keras_adam, apply_function: pointwise.h, keras_adam.h.
// Tensors are contiguous and given by address; 0 is none. What is there of sizes and dtypes, Python has checked.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"
#include "cpu/keras_adam/keras_adam.h"
#include "cpu/parts/pointwise.h"
#include "cpu/parts/threads.h"
#include "cpu/parts/workspace.h"

namespace apv_fast {
namespace {

using Address = uintptr_t;
using Two = std::array<Address, 2>;

constexpr int64_t kGrain = 16384;  // numbers that are worth a thread

int threads_for(int64_t numbers, int requested) {
  const int64_t most = numbers / kGrain + 1;
  return usable_threads(requested < most ? requested : int(most));
}

const void* input(Address address) { return reinterpret_cast<const void*>(address); }
void* output(Address address) { return reinterpret_cast<void*>(address); }
int64_t width_of(const std::string& dtype) { return dtype == "float64" ? sizeof(double) : sizeof(float); }

template <class Problem>
void run(const ByType<Problem>& functions, const Problem& problem, const std::string& dtype) {
  const auto function = dtype == "float32"    ? functions.float32
                        : dtype == "float64"  ? functions.float64
                        : dtype == "bfloat16" ? functions.bfloat16
                                              : nullptr;
  if (function == nullptr) throw std::invalid_argument("dtype '" + dtype + "' is not supported here");
  function(problem);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void sample_latents(int64_t rows, int64_t stoch, int64_t discrete, double min_std, Address stats, Address noise,
                    Address seed, Address grad, Address out, int threads, const std::string& dtype,
                    const std::string& isa) {
  require(rows >= 0 && stoch >= 0 && discrete >= 0, "sample: sizes must not be negative");
  SampleProblem p{};
  p.rows = rows, p.stoch = stoch, p.discrete = discrete, p.min_std = min_std;
  p.threads = threads_for(rows * stoch * (discrete + 1), threads);
  p.stats = input(stats), p.noise = input(noise), p.seed = static_cast<const int64_t*>(input(seed));
  p.grad = input(grad), p.out = output(out);
  run(APV_FAST_PICK(isa_of(isa), sample), p, dtype);
}

void gumbel_noise(int64_t count, Address seed, Address out, int threads, const std::string& dtype,
                  const std::string& isa) {
  require(count >= 0, "gumbel: count must not be negative");
  const GumbelProblem p{count, threads_for(count, threads), static_cast<const int64_t*>(input(seed)), output(out)};
  run(APV_FAST_PICK(isa_of(isa), draw_gumbel), p, dtype);
}

void kl(std::array<int64_t, 3> sizes, std::array<double, 2> weights, double free, bool per_step, Two p_tensors,
        Two q_tensors, std::array<Address, 3> results, Address grad, Two grad_p, Two grad_q, int threads,
        const std::string& dtype, const std::string& isa) {
  KlProblem p{};
  p.steps = sizes[0], p.stoch = sizes[1], p.classes = sizes[2];
  require(p.steps >= 0 && p.stoch >= 0 && p.classes >= 0, "kl_loss: sizes must not be negative");
  p.weight_p = weights[0], p.weight_q = weights[1], p.free = free, p.per_step = per_step;
  p.threads = threads_for(p.steps * p.stoch * (p.classes + 1), threads);
  for (int i = 0; i < 2; ++i) {
    p.p[i] = input(p_tensors[i]), p.q[i] = input(q_tensors[i]);
    p.grad_p[i] = output(grad_p[i]), p.grad_q[i] = output(grad_q[i]);
  }
  p.value = output(results[0]), p.mean = output(results[1]), p.loss = output(results[2]), p.grad = input(grad);
  const Workspace scratch(p.threads * 2 * p.classes * width_of(dtype));
  p.scratch = scratch.data();
  run(APV_FAST_PICK(isa_of(isa), kl_loss), p, dtype);
}

void image(bool of_loss, int64_t count, int64_t images, double scale, double constant, Address bytes, Address mean,
           Address loss, Address out, int threads, const std::string& dtype, const std::string& isa) {
  require(count >= 0 && images >= 0, "image_loss: sizes must not be negative");
  ImageProblem p{};
  p.count = count, p.images = images, p.scale = scale, p.constant = constant;
  p.threads = threads_for(count, threads);
  p.image = static_cast<const uint8_t*>(input(bytes)), p.mean = input(mean);
  p.loss = output(loss), p.out = output(out);
  std::vector<double> partial(of_loss ? (count + kImageBlock - 1) / kImageBlock : 0);
  p.partial = partial.data();
  if (of_loss) {
    run(APV_FAST_PICK(isa_of(isa), image_loss), p, dtype);
  } else {
    run(APV_FAST_PICK(isa_of(isa), normalize_image), p, dtype);
  }
}

void returns(int64_t horizon, int64_t n, double lambda, std::array<Address, 4> inputs, Address out, Address grad,
             std::array<Address, 4> gradients, int threads, const std::string& dtype, const std::string& isa) {
  require(horizon >= 1 && n >= 0, "lambda_return: H must be at least 1 and N at least 0");
  ReturnsProblem p{};
  p.horizon = horizon, p.n = n, p.lambda = lambda;
  p.threads = threads_for(horizon * n, threads);
  p.reward = input(inputs[0]), p.value = input(inputs[1]);
  p.discount = input(inputs[2]), p.bootstrap = input(inputs[3]);
  p.out = output(out), p.grad = input(grad);
  p.grad_reward = output(gradients[0]), p.grad_value = output(gradients[1]);
  p.grad_discount = output(gradients[2]), p.grad_bootstrap = output(gradients[3]);
  const Workspace scratch(p.threads * horizon * 64);
  p.scratch = scratch.data();
  run(APV_FAST_PICK(isa_of(isa), lambda_return), p, dtype);
}

using Numbers = std::vector<int64_t>;

double adam(const Numbers& weights, const Numbers& gradients, const Numbers& first, const Numbers& second,
            const Numbers& sizes, double size, double eps, double clip, double decay, std::array<double, 2> betas,
            int threads, const std::string& dtype, const std::string& isa) {
  const size_t n = weights.size();
  require(gradients.size() == n && first.size() == n && second.size() == n && sizes.size() == n,
          "keras_adam: there must be as many gradients, moments and sizes as weights");
  std::vector<AdamWeight> of_weight;
  std::vector<AdamBlock> blocks;
  for (size_t i = 0; i < n; ++i) {
    of_weight.push_back({output(weights[i]), input(gradients[i]), output(first[i]), output(second[i]), sizes[i]});
    for (int64_t begin = 0; begin < sizes[i]; begin += kAdamBlock) {
      blocks.push_back({int64_t(i), begin, std::min(begin + kAdamBlock, sizes[i])});
    }
  }
  std::vector<double> partial(blocks.size());
  double norm = 0;
  const AdamProblem p{of_weight.data(),  blocks.data(), int64_t(blocks.size()), size, eps, clip, decay, betas[0],
                      betas[1], threads_for(int64_t(blocks.size()) * kAdamBlock, threads), partial.data(), &norm};
  const AdamTable& table = APV_FAST_PICK(isa_of(isa), keras_adam);
  require(dtype == "float32" || dtype == "float64", "keras_adam: weights must be float32 or float64");
  (dtype == "float32" ? table.float32 : table.float64)(p);
  return norm;
}

void apply(const std::string& name, int64_t count, Address from, Address out, const std::string& dtype,
           const std::string& isa) {
  require(count >= 0, "apply_function: count must not be negative");
  const FunctionProblem p{count, name.c_str(), input(from), output(out)};
  run(APV_FAST_PICK(isa_of(isa), apply_function), p, dtype);
}

}  // namespace

void bind_pointwise(pybind11::module_& module) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> released;
  module.def("sample", &sample_latents, released,
             "Samples of latents [rows, L] or, with the samples' gradient `grad`, the statistics' [rows, M].",
             py::kw_only(), py::arg("rows"), py::arg("stoch"), py::arg("discrete"), py::arg("min_std"),
             py::arg("stats"), py::arg("noise"), py::arg("seed"), py::arg("grad"), py::arg("out"), py::arg("threads"),
             py::arg("dtype"), py::arg("isa"));
  module.def("gumbel", &gumbel_noise, released, "Gumbel noise of the seed at an address, `count` numbers.",
             py::kw_only(), py::arg("count"), py::arg("seed"), py::arg("out"), py::arg("threads"), py::arg("dtype"),
             py::arg("isa"));
  module.def("kl_loss", &kl, released,
             "Leaves `results`: value, its mean and the loss; or, with the cotangent `grad`, reads them and leaves the "
             "gradients. `sizes`: steps, S and C (0: Gaussian, whose tensors are means and deviations).",
             py::kw_only(), py::arg("sizes"), py::arg("weights"), py::arg("free"), py::arg("per_step"), py::arg("p"),
             py::arg("q"), py::arg("results"), py::arg("grad"), py::arg("grad_p"), py::arg("grad_q"),
             py::arg("threads"), py::arg("dtype"), py::arg("isa"));
  module.def("image", &image, released,
             "The image loss and `scale` times its gradient, each unless its address is 0, or the normalised image.",
             py::kw_only(), py::arg("of_loss"), py::arg("count"), py::arg("images"), py::arg("scale"),
             py::arg("constant"), py::arg("image"), py::arg("mean"), py::arg("loss"), py::arg("out"),
             py::arg("threads"), py::arg("dtype"), py::arg("isa"));
  module.def("lambda_return", &returns, released,
             "Returns or, with their gradient `grad`, the gradients of reward, value, discount and bootstrap.",
             py::kw_only(), py::arg("horizon"), py::arg("n"), py::arg("lambda_"), py::arg("inputs"), py::arg("out"),
             py::arg("grad"), py::arg("gradients"), py::arg("threads"), py::arg("dtype"), py::arg("isa"));
  module.def("keras_adam", &adam, released,
             "A step in place; returns the gradients' norm. A gradient of 0 is none. `size` is the corrected rate.",
             py::kw_only(), py::arg("weights"), py::arg("gradients"), py::arg("first"), py::arg("second"),
             py::arg("sizes"), py::arg("size"), py::arg("eps"), py::arg("clip"), py::arg("decay"), py::arg("betas"),
             py::arg("threads"), py::arg("dtype"), py::arg("isa"));
  module.def("apply_function", &apply, released, "One of csrc/cpu/parts/functions.cpp, element by element; for tests.",
             py::kw_only(), py::arg("name"), py::arg("count"), py::arg("from_"), py::arg("out"), py::arg("dtype"),
             py::arg("isa"));
}

}  // namespace apv_fast
