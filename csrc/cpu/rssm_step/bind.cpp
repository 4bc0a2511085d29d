// apv_fast._C.FilterStep: one step of filtering and acting, its weights bound once.

#include "rssm_step.h"

#include <memory>
#include <vector>

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

using Sizes = std::map<std::string, int64_t>;
using Layer = std::array<Address, 3>;  // weight, bias, units

LayerWeights layer_of(const Layer& layer) {
  return {pointer(layer[0]), pointer(layer[1]), int64_t(layer[2])};
}

void set_sizes(StepModel& m, Sizes sizes) {
  Fields<int64_t> fields("step", std::move(sizes));
  int64_t hidden = 0;
  fields.set("deter", m.deter);
  fields.set("hidden", hidden);
  fields.set("stoch", m.stoch);
  fields.set("discrete", m.discrete);
  fields.set("inputs", m.inputs);
  fields.set("actions", m.actions);
  fields.set("embed", m.embed);
  fields.set("sees_below", m.sees_below);
  fields.done();
  m.img_in.units = m.post.hidden.units = m.prior.hidden.units = hidden;
  m.gru.units = 3 * m.deter;
  m.post.dist.units = m.prior.dist.units = m.statistics();
}

void set_layer(Fields<Address>& fields, const std::string& name, LayerWeights& layer) {
  fields.set(name + "_weight", layer.weight);
  fields.set(name + "_bias", layer.bias);
}

void set_weights(StepModel& m, Addresses weights) {
  Fields<Address> fields("step", std::move(weights));
  set_layer(fields, "img_in", m.img_in);
  set_layer(fields, "gru", m.gru);
  fields.set("gru_norm_weight", m.norm_weight);
  fields.set("gru_norm_bias", m.norm_bias);
  set_layer(fields, "img_out", m.prior.hidden);
  set_layer(fields, "img_dist", m.prior.dist);
  set_layer(fields, "obs_out", m.post.hidden);
  set_layer(fields, "obs_dist", m.post.dist);
  fields.set("img_in_rows", m.img_in_rows);
  fields.set("obs_out_rows", m.obs_out_rows);
  fields.done();
}

// What changes from step to step, addresses or 0; the order of FilterStep.run's lists.
using ModelTensors = std::array<Address, 13>;
using ActorTensors = std::array<Address, 3>;

template <class Pointer>
void point(Pointer& field, Address address) {
  field = pointer<Pointer>(address);
}

void set_tensors(StepModel& m, const ModelTensors& x) {
  point(m.before_deter, x[0]);
  point(m.before_stoch, x[1]);
  point(m.action, x[2]);
  point(m.embed_in, x[3]);
  point(m.after_deter, x[4]);
  StepHead* const heads[] = {&m.post, &m.prior};
  for (int i = 0; i < 2; ++i) {
    point(heads[i]->stoch, x[5 + 4 * i]);
    point(heads[i]->stats, x[6 + 4 * i]);
    point(heads[i]->noise.values, x[7 + 4 * i]);
    point(heads[i]->noise.seed, x[8 + 4 * i]);
  }
}

void check(const StepProblem& p) {
  require(p.rows >= 0, "step: rows must not be negative");
  for (int64_t i = 0; i < p.models; ++i) {
    const StepModel& m = p.model[i];
    require(m.deter >= 1 && m.stoch >= 1 && m.img_in.units >= 1, "step: sizes must be at least 1");
    require(m.discrete >= 0 && m.actions >= 0 && m.embed >= 0, "step: sizes must not be negative");
    require(m.inputs >= m.latents() + m.actions,
            "step: img_in_weight must have a column a number of stoch and action");
  }
  require(p.layers == 0 || p.model[p.models - 1].post.there(), "step: an actor needs a posterior");
}

// This thread's working memory, kept from step to step: a few hundred kilobytes.
void* memory_of(size_t bytes) {
  thread_local std::unique_ptr<Workspace> memory;
  thread_local size_t size = 0;
  if (bytes > size || memory == nullptr) {
    memory.reset();
    size = 0;
    memory = std::make_unique<Workspace>(bytes);
    size = bytes;
  }
  return memory->data();
}

class FilterStep {
 public:
  FilterStep(const std::vector<Sizes>& sizes, const std::vector<double>& latent_min_std,
             const std::vector<Addresses>& weights, std::string dtype)
      : dtype_(std::move(dtype)), isa_(isa_in_use()) {
    const size_t models = sizes.size();
    require((models == 1 || models == 2) && weights.size() == models && latent_min_std.size() == models,
            "step: there must be one model or two");
    problem_.models = int64_t(models);
    for (size_t i = 0; i < models; ++i) {
      set_sizes(problem_.model[i], sizes[i]);
      set_weights(problem_.model[i], weights[i]);
      problem_.model[i].min_std = latent_min_std[i];
    }
  }

  // Hidden layers and the head of an actor; `rows` may be 0, see StepProblem::actor_rows.
  void add_actor(const std::vector<Layer>& layers, Address rows, const Layer& head, int64_t actions, bool one_hot,
                 double min_std) {
    require(!layers.empty() && layers.size() <= size_t(kMostLayers), "step: an actor must have 1 to 16 hidden layers");
    problem_.layers = int64_t(layers.size());
    for (size_t l = 0; l < layers.size(); ++l) problem_.layer[l] = layer_of(layers[l]);
    problem_.actor_rows = pointer(rows);
    problem_.head = layer_of(head);
    problem_.actions = actions;
    problem_.one_hot_actions = one_hot;
    problem_.min_std = min_std;
  }

  // May be called by several threads at once: they share nothing but what they only read.
  void run(int64_t rows, Address is_first, const std::vector<ModelTensors>& models, const ActorTensors& actor,
           int threads) const {
    StepProblem p = problem_;
    require(int64_t(models.size()) == p.models, "step: not the tensors of so many models");
    p.rows = rows;
    p.threads = usable_threads(threads);
    point(p.is_first, is_first);
    for (int64_t i = 0; i < p.models; ++i) set_tensors(p.model[i], models[i]);
    point(p.action_noise.values, actor[0]);
    point(p.action_noise.seed, actor[1]);
    point(p.action_out, actor[2]);
    check(p);
    const auto& pass = of_dtype(APV_FAST_PICK(isa_, filter_step), dtype_, "step");
    if (p.rows > 0) pass.run(p, memory_of(pass.bytes(p)));
  }

 private:
  StepProblem problem_{};
  std::string dtype_;
  Isa isa_;
};

}  // namespace

void bind_rssm_step(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<FilterStep>(module, "FilterStep", "One step of one RSSM or two and perhaps an actor: csrc/cpu/rssm_step/.")
      .def(py::init<const std::vector<Sizes>&, const std::vector<double>&, const std::vector<Addresses>&, std::string>(),
           py::kw_only(), py::arg("sizes"), py::arg("latent_min_std"), py::arg("weights"), py::arg("dtype"))
      .def("add_actor", &FilterStep::add_actor,
           "Weight, bias and units of every layer; the first one's columns for stoch, turned, or 0.", py::kw_only(),
           py::arg("layers"), py::arg("rows"), py::arg("head"), py::arg("actions"), py::arg("one_hot"),
           py::arg("min_std"))
      .def("run", &FilterStep::run, py::call_guard<py::gil_scoped_release>(),
           "Addresses or 0, a model: deter, stoch, action, embed, then the new deter; stoch, stats, noise and its seed "
           "of the posterior, and of the prior. Of the actor: noise, its seed, the action.",
           py::arg("rows"), py::arg("is_first"), py::arg("models"), py::arg("actor"), py::arg("threads"));
}

}  // namespace apv_fast
