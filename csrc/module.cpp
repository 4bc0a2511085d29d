// The Python module apv_fast._C. Tensors arrive as addresses, shapes and strides (in elements) that Python has checked:
// no libtorch here, so that one build serves every version of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "module.h"
#include "cpu/parts/isa.h"
#include "cpu/knn_bonus/knn_bonus.h"
#include "cpu/parts/threads.h"

namespace {

using Pair = std::array<int64_t, 2>;

size_t knn_bonus(uintptr_t query, Pair query_shape, Pair query_strides, uintptr_t keys, Pair keys_shape,
                 Pair keys_strides, uintptr_t out, int64_t k, bool mean, const std::string& dtype, int threads,
                 const std::string& isa) {
  const auto matrix = [](uintptr_t data, Pair shape, Pair strides) {
    return apv_fast::Matrix{reinterpret_cast<const void*>(data), shape[0], shape[1], strides[0], strides[1]};
  };
  const apv_fast::KnnOptions options{k, mean, dtype, isa, threads};
  return apv_fast::knn_bonus(matrix(query, query_shape, query_strides), matrix(keys, keys_shape, keys_strides), options,
                             reinterpret_cast<void*>(out));
}

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
  module.def("has_amx", &apv_fast::has_amx, "Whether the CPU multiplies bfloat16 in tiles.");
  module.def("share_out", &share_out, "Calls all of `parts`, dealt out to threads; each sees one OpenMP thread.",
             pybind11::kw_only(), pybind11::arg("parts"), pybind11::arg("threads"));
#if defined(_OPENMP)
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  namespace py = pybind11;
  module.def("knn_bonus", &knn_bonus, py::call_guard<py::gil_scoped_release>(),
             "Writes the bonus to the address `out`; returns the bytes of working memory it took.", py::kw_only(),
             py::arg("query"), py::arg("query_shape"), py::arg("query_strides"), py::arg("keys"), py::arg("keys_shape"),
             py::arg("keys_strides"), py::arg("out"), py::arg("k"), py::arg("mean"), py::arg("dtype"),
             py::arg("threads"), py::arg("isa"));
  apv_fast::bind_dense(module);
  apv_fast::bind_image_model(module);
  apv_fast::bind_imagine(module);
  apv_fast::bind_pointwise(module);
  apv_fast::bind_scan(module);
  apv_fast::bind_step(module);
}
