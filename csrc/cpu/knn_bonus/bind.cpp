// apv_fast._C.knn_bonus.

#include "knn_bonus.h"

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

using Pair = std::array<int64_t, 2>;

size_t bonus(Address query, Pair query_shape, Pair query_strides, Address keys, Pair keys_shape, Pair keys_strides,
             Address out, int64_t k, bool mean, const std::string& dtype, int threads) {
  const auto matrix = [](Address data, Pair shape, Pair strides) {
    return Matrix{pointer(data), shape[0], shape[1], strides[0], strides[1]};
  };
  const KnnOptions options{k, mean, dtype, isa_in_use(), threads};
  return knn_bonus(matrix(query, query_shape, query_strides), matrix(keys, keys_shape, keys_strides), options,
                   pointer(out));
}

}  // namespace

void bind_knn_bonus(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("knn_bonus", &bonus, py::call_guard<py::gil_scoped_release>(),
             "Writes the bonus to the address `out`; returns the bytes of working memory it took.", py::kw_only(),
             py::arg("query"), py::arg("query_shape"), py::arg("query_strides"), py::arg("keys"), py::arg("keys_shape"),
             py::arg("keys_strides"), py::arg("out"), py::arg("k"), py::arg("mean"), py::arg("dtype"),
             py::arg("threads"));
}

}  // namespace apv_fast
