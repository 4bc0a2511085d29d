// apv_fast._C.keras_adam: a step of Keras' Adam.

#include "keras_adam.h"

#include <algorithm>
#include <vector>

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

using List = std::vector<Address>;

double adam(const List& weights, const List& gradients, const List& first, const List& second,
            const std::vector<int64_t>& sizes, double size, double eps, double clip, double decay,
            std::array<double, 2> betas, int threads, const std::string& dtype) {
  const size_t n = weights.size();
  require(gradients.size() == n && first.size() == n && second.size() == n && sizes.size() == n,
          "keras_adam: there must be as many gradients, moments and sizes as weights");
  std::vector<AdamWeight> of_weight;
  std::vector<AdamBlock> blocks;
  for (size_t i = 0; i < n; ++i) {
    of_weight.push_back({pointer(weights[i]), pointer(gradients[i]), pointer(first[i]), pointer(second[i]), sizes[i]});
    for (int64_t begin = 0; begin < sizes[i]; begin += kAdamBlock) {
      blocks.push_back({int64_t(i), begin, std::min(begin + kAdamBlock, sizes[i])});
    }
  }
  std::vector<double> partial(blocks.size());
  double norm = 0;
  const AdamProblem p{of_weight.data(),  blocks.data(), int64_t(blocks.size()), size, eps, clip, decay, betas[0],
                      betas[1], threads_for(int64_t(blocks.size()) * kAdamBlock, threads), partial.data(), &norm};
  of_dtype(APV_FAST_PICK(isa_in_use(), keras_adam), dtype, "keras_adam")(p);
  return norm;
}

}  // namespace

void bind_keras_adam(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("keras_adam", &adam, py::call_guard<py::gil_scoped_release>(),
             "A step in place; returns the gradients' norm. A gradient of 0 is none. `size` is the corrected rate.",
             py::kw_only(), py::arg("weights"), py::arg("gradients"), py::arg("first"), py::arg("second"),
             py::arg("sizes"), py::arg("size"), py::arg("eps"), py::arg("clip"), py::arg("decay"), py::arg("betas"),
             py::arg("threads"), py::arg("dtype"));
}

}  // namespace apv_fast
