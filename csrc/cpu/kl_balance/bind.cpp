// apv_fast._C.kl_loss: the balanced KL loss, forward or backward.

#include "kl_balance.h"

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

using Two = std::array<Address, 2>;

void kl_loss(std::array<int64_t, 3> sizes, std::array<double, 2> weights, double free, bool per_step, Two p_tensors,
             Two q_tensors, std::array<Address, 3> results, Address grad, Two grad_p, Two grad_q, int threads,
             const std::string& dtype) {
  KlProblem p{};
  p.steps = sizes[0], p.stoch = sizes[1], p.classes = sizes[2];
  require(p.steps >= 0 && p.stoch >= 0 && p.classes >= 0, "kl_loss: sizes must not be negative");
  p.weight_p = weights[0], p.weight_q = weights[1], p.free = free, p.per_step = per_step;
  p.threads = threads_for(p.steps * p.stoch * (p.classes + 1), threads);
  for (int i = 0; i < 2; ++i) {
    p.p[i] = pointer(p_tensors[i]), p.q[i] = pointer(q_tensors[i]);
    p.grad_p[i] = pointer(grad_p[i]), p.grad_q[i] = pointer(grad_q[i]);
  }
  p.value = pointer(results[0]), p.mean = pointer(results[1]), p.loss = pointer(results[2]), p.grad = pointer(grad);
  const size_t wide = dtype == "float64" ? sizeof(double) : sizeof(float);
  const Workspace scratch(p.threads * 2 * p.classes * wide);
  p.scratch = scratch.data();
  of_dtype(APV_FAST_PICK(isa_in_use(), kl_balance), dtype, "kl_loss")(p);
}

}  // namespace

void bind_kl_balance(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("kl_loss", &kl_loss, py::call_guard<py::gil_scoped_release>(),
             "Leaves `results`: value, its mean and the loss; or, with the cotangent `grad`, reads them and leaves the "
             "gradients. `sizes`: steps, S and C (0: Gaussian, whose tensors are means and deviations).",
             py::kw_only(), py::arg("sizes"), py::arg("weights"), py::arg("free"), py::arg("per_step"), py::arg("p"),
             py::arg("q"), py::arg("results"), py::arg("grad"), py::arg("grad_p"), py::arg("grad_q"),
             py::arg("threads"), py::arg("dtype"));
}

}  // namespace apv_fast
