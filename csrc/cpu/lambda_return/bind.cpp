// apv_fast._C.lambda_return: the λ-return, forward or backward.

#include "lambda_return.h"

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

void returns(int64_t horizon, int64_t n, double lambda, std::array<Address, 4> inputs, Address out, Address grad,
             std::array<Address, 4> gradients, int threads, const std::string& dtype) {
  require(horizon >= 1 && n >= 0, "lambda_return: H must be at least 1 and N at least 0");
  ReturnsProblem p{};
  p.horizon = horizon, p.n = n, p.lambda = lambda;
  p.threads = threads_for(horizon * n, threads);
  p.reward = pointer(inputs[0]), p.value = pointer(inputs[1]);
  p.discount = pointer(inputs[2]), p.bootstrap = pointer(inputs[3]);
  p.out = pointer(out), p.grad = pointer(grad);
  p.grad_reward = pointer(gradients[0]), p.grad_value = pointer(gradients[1]);
  p.grad_discount = pointer(gradients[2]), p.grad_bootstrap = pointer(gradients[3]);
  const Workspace scratch(p.threads * horizon * 64);
  p.scratch = scratch.data();
  of_dtype(APV_FAST_PICK(isa_in_use(), lambda_return), dtype, "lambda_return")(p);
}

}  // namespace

void bind_lambda_return(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("lambda_return", &returns, py::call_guard<py::gil_scoped_release>(),
             "Returns or, with their gradient `grad`, the gradients of reward, value, discount and bootstrap.",
             py::kw_only(), py::arg("horizon"), py::arg("n"), py::arg("lambda_"), py::arg("inputs"), py::arg("out"),
             py::arg("grad"), py::arg("gradients"), py::arg("threads"), py::arg("dtype"));
}

}  // namespace apv_fast
