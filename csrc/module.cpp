// The Python module apv_fast._C. Tensors arrive as addresses, shapes and strides (in elements) that Python has checked:
// no libtorch here, so that one build serves every version of torch.
//
// cpu/<op>/ holds an op: in bind.cpp its functions of this module (arguments, checks, the choice of a kernel), in
// forward.cpp and backward.cpp the kernels; where one file holds all of them, it has the op's name.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/parts/isa.h"
#include "cpu/parts/threads.h"
#include "module.h"

namespace {

// The libraries behind a part ask OpenMP how many threads they may plan for: one each, however many there are here.
void share_out(const std::vector<pybind11::function>& parts, int threads) {
  std::exception_ptr error;
  {
    const pybind11::gil_scoped_release released;
    static_cast<void>(threads);
#if defined(_OPENMP)
#pragma omp parallel num_threads(apv_fast::usable_threads(threads))
#endif
    {
#if defined(_OPENMP)
      omp_set_num_threads(1);  // of this thread, until the region ends
#pragma omp for schedule(dynamic)
#endif
      for (size_t i = 0; i < parts.size(); ++i) {
        const pybind11::gil_scoped_acquire held;
        try {
          parts[i]();
        } catch (...) {
          if (!error) error = std::current_exception();
        }
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "apv_fast's C++ code.";
  module.def("supported_isas", &apv_fast::supported_isas, "Instruction sets that run here, the fastest first.");
  module.def("isa", [] { return apv_fast::name_of(apv_fast::isa_in_use()); },
             "The instruction set in use, see APV_FAST_CPU_ISA.");
  module.def("has_amx", &apv_fast::has_amx, "Whether the CPU multiplies bfloat16 in tiles.");
  module.def("share_out", &share_out, "Calls all of `parts`, dealt out to threads; each sees one OpenMP thread.",
             pybind11::kw_only(), pybind11::arg("parts"), pybind11::arg("threads"));
#if defined(_OPENMP)
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  apv_fast::bind_image_loss(module);
  apv_fast::bind_image_model(module);
  apv_fast::bind_keras_adam(module);
  apv_fast::bind_kl_balance(module);
  apv_fast::bind_knn_bonus(module);
  apv_fast::bind_lambda_return(module);
  apv_fast::bind_parts(module);
  apv_fast::bind_rssm_imagine(module);
  apv_fast::bind_rssm_observe(module);
  apv_fast::bind_rssm_step(module);
}
