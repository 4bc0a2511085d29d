// apv_fast._C.rssm_scan: the recurrence of the posterior scan, forward or backward.

#include "rssm_observe.h"

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

void set_pointers(ObserveProblem& p, Addresses addresses) {
  Fields<Address> fields("rssm_scan", std::move(addresses));
#define APV_FAST_FIELD(name) fields.set(#name, p.name)
  APV_FAST_FIELD(gru_bias);
  APV_FAST_FIELD(norm_weight);
  APV_FAST_FIELD(norm_bias);
  APV_FAST_FIELD(dist_bias);
  APV_FAST_FIELD(input_x);
  APV_FAST_FIELD(input_obs);
  APV_FAST_FIELD(keep);
  APV_FAST_FIELD(start);
  APV_FAST_FIELD(noise);
  APV_FAST_FIELD(seed);
  APV_FAST_FIELD(deter_trace);
  APV_FAST_FIELD(stoch_trace);
  APV_FAST_FIELD(stats_trace);
  APV_FAST_FIELD(parts_trace);
  APV_FAST_FIELD(norm_trace);
  APV_FAST_FIELD(x_trace);
  APV_FAST_FIELD(y_trace);
  APV_FAST_FIELD(grad_deter);
  APV_FAST_FIELD(grad_stoch);
  APV_FAST_FIELD(grad_stats);
  APV_FAST_FIELD(dx);
  APV_FAST_FIELD(dparts);
  APV_FAST_FIELD(dy);
  APV_FAST_FIELD(dstats);
  APV_FAST_FIELD(dstart);
  APV_FAST_FIELD(dnorm_weight);
  APV_FAST_FIELD(dnorm_bias);
#undef APV_FAST_FIELD
  fields.done();
}

void check_shape(const Weight& weight, int64_t rows, int64_t columns, const char* name) {
  if (weight.rows == rows && weight.columns == columns) return;
  throw std::invalid_argument(std::string("rssm_scan: ") + name + " must be [" + std::to_string(rows) + ", " +
                              std::to_string(columns) + "]");
}

void check(const ObserveProblem& p) {
  if (p.batch < 1 || p.length < 1 || p.deter < 1 || p.hidden < 1 || p.stoch < 1 || p.discrete < 0) {
    throw std::invalid_argument("rssm_scan: sizes must be at least 1");
  }
  check_shape(p.weight_stoch, p.hidden, p.latents(), "weight_stoch");
  check_shape(p.weight_gru, 3 * p.deter, p.hidden + p.deter, "weight_gru");
  check_shape(p.weight_obs, p.hidden, p.deter, "weight_obs");
  check_shape(p.weight_dist, p.statistics(), p.hidden, "weight_dist");
}

using Sizes = std::array<int64_t, 6>;
using Matrices = std::array<std::array<int64_t, 5>, 4>;

void scan(bool backward, const Sizes& sizes, double min_std, const Matrices& weights, Addresses addresses, int threads,
          const std::string& dtype) {
  ObserveProblem p{};
  p.batch = sizes[0];
  p.length = sizes[1];
  p.deter = sizes[2];
  p.hidden = sizes[3];
  p.stoch = sizes[4];
  p.discrete = sizes[5];
  p.min_std = min_std;
  p.threads = usable_threads(threads);
  Weight* const fields[] = {&p.weight_stoch, &p.weight_gru, &p.weight_obs, &p.weight_dist};
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto& [data, rows, columns, row_stride, column_stride] = weights[i];
    *fields[i] = {pointer(data), rows, columns, row_stride, column_stride};
  }
  set_pointers(p, std::move(addresses));
  check(p);
  const Isa chosen = isa_in_use();
  const auto& table = backward ? APV_FAST_PICK(chosen, observe_backward) : APV_FAST_PICK(chosen, observe_forward);
  run(of_dtype(table, dtype, "rssm_scan"), p);
}

}  // namespace

void bind_rssm_observe(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("rssm_scan", &scan, py::call_guard<py::gil_scoped_release>(),
             "Runs the recurrence on tensors by name and address, see csrc/cpu/rssm_observe/. `sizes` are B, T, D, "
             "H, S and C; `weights` are stoch, gru, obs and dist: address, rows, columns and strides.",
             py::kw_only(), py::arg("backward"), py::arg("sizes"), py::arg("min_std"), py::arg("weights"),
             py::arg("addresses"), py::arg("threads"), py::arg("dtype"));
}

}  // namespace apv_fast
