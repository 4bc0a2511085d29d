// apv_fast._C.imagine: imagination, forward or backward.

#include "rssm_imagine.h"

#include <vector>

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

#define APV_FAST_SET(name) fields.set(#name, p.name);

void set_sizes(ImagineProblem& p, std::map<std::string, int64_t> sizes) {
  Fields<int64_t> fields("imagine", std::move(sizes));
  APV_FAST_SET(steps) APV_FAST_SET(rows) APV_FAST_SET(deter) APV_FAST_SET(hidden) APV_FAST_SET(stoch)
  APV_FAST_SET(discrete) APV_FAST_SET(inputs) APV_FAST_SET(actions)
  APV_FAST_SET(batch_first) APV_FAST_SET(one_hot_actions)
  fields.done();
}

void set_tensors(ImagineProblem& p, Addresses tensors) {
  Fields<Address> fields("imagine", std::move(tensors));
  APV_FAST_SET(img_in_weight) APV_FAST_SET(img_in_bias) APV_FAST_SET(gru_weight) APV_FAST_SET(gru_bias)
  APV_FAST_SET(norm_weight) APV_FAST_SET(norm_bias) APV_FAST_SET(img_out_weight) APV_FAST_SET(img_out_bias)
  APV_FAST_SET(dist_weight) APV_FAST_SET(dist_bias) APV_FAST_SET(start_deter) APV_FAST_SET(start_stoch)
  APV_FAST_SET(input_action) APV_FAST_SET(deter_trace) APV_FAST_SET(stoch_trace) APV_FAST_SET(stats_trace)
  APV_FAST_SET(action_trace) APV_FAST_SET(x_trace) APV_FAST_SET(parts_trace) APV_FAST_SET(y_trace)
  APV_FAST_SET(norm_trace) APV_FAST_SET(head_trace) APV_FAST_SET(grad_deter) APV_FAST_SET(grad_stoch)
  APV_FAST_SET(grad_stats) APV_FAST_SET(grad_action) APV_FAST_SET(dx) APV_FAST_SET(dparts) APV_FAST_SET(dy)
  APV_FAST_SET(dstats) APV_FAST_SET(dhead) APV_FAST_SET(dstart_deter) APV_FAST_SET(dstart_stoch)
  APV_FAST_SET(daction) APV_FAST_SET(dnorm_weight) APV_FAST_SET(dnorm_bias)
  fields.set("noise", p.noise.values);
  fields.set("seed", p.noise.seed);
  fields.set("action_noise", p.action_noise.values);
  fields.set("action_seed", p.action_noise.seed);
  fields.set("head_weight", p.head.weight);
  fields.set("head_bias", p.head.bias);
  for (int64_t l = 0; l < p.layers; ++l) {
    const std::string number = std::to_string(l);
    fields.set("layer_weight" + number, p.layer[l].weight);
    fields.set("layer_bias" + number, p.layer[l].bias);
    fields.set("layer_trace" + number, p.layer_trace[l]);
    fields.set("dlayer" + number, p.dlayer[l]);
  }
  fields.done();
}

#undef APV_FAST_SET

void check(const ImagineProblem& p) {
  require(p.steps >= 1 && p.rows >= 0 && p.deter >= 1 && p.hidden >= 1 && p.stoch >= 1,
          "imagine: sizes must be at least 1");
  require(p.discrete >= 0 && p.actions >= 0, "imagine: sizes must not be negative");
  require(p.inputs >= p.latents() + p.actions,
          "imagine: img_in_weight must have a column a number of stoch and action");
}

void imagine(bool backward, std::map<std::string, int64_t> sizes, const std::vector<int64_t>& units,
             double latent_min_std, double min_std, Addresses tensors, int threads, const std::string& dtype) {
  ImagineProblem p{};
  require(units.size() <= size_t(kMostLayers), "imagine: an actor has at most 16 hidden layers");
  p.layers = int64_t(units.size());
  for (size_t l = 0; l < units.size(); ++l) p.layer[l].units = units[l];
  p.latent_min_std = latent_min_std;
  p.min_std = min_std;
  p.threads = usable_threads(threads);
  set_sizes(p, std::move(sizes));
  set_tensors(p, std::move(tensors));
  check(p);
  const Isa chosen = isa_in_use();
  const auto& table = backward ? APV_FAST_PICK(chosen, imagine_backward) : APV_FAST_PICK(chosen, imagine_forward);
  run(of_dtype(table, dtype, "imagine"), p);
}

}  // namespace

void bind_rssm_imagine(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("imagine", &imagine, py::call_guard<py::gil_scoped_release>(),
             "Runs imagination on tensors by name and address, see ImagineProblem in csrc/cpu/rssm_imagine/; `units` are "
             "the sizes of the actor's hidden layers, none: actions are given.",
             py::kw_only(), py::arg("backward"), py::arg("sizes"), py::arg("units"), py::arg("latent_min_std"),
             py::arg("min_std"), py::arg("tensors"), py::arg("threads"), py::arg("dtype"));
}

}  // namespace apv_fast
