// apv_fast._C.encoder_… and decoder_…: passes over the image models. Addresses are of contiguous tensors that Python has
// checked; 0 is none.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../module.h"
#include "image_model.h"
#include "../parts/threads.h"
#include "../parts/workspace.h"

namespace apv_fast {
namespace {

using Addresses = std::vector<uintptr_t>;

template <class Pointer = void*>
Pointer pointer(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

template <class Arguments>
const ImageModel<Arguments>& model_of(const ImageModels<Arguments>& models, const std::string& dtype) {
  if (dtype == "float32") return models.float32;
  if (dtype == "float64") return models.float64;
  if (dtype == "bfloat16") return models.bfloat16;
  throw std::invalid_argument("image model: dtype '" + dtype + "' is not supported");
}

template <class Arguments>
void run(const Pass<Arguments>& pass, const Arguments& arguments) {
  const Workspace workspace(pass.bytes(arguments));
  pass.run(arguments, workspace.data());
}

template <class Arguments>
void set_layers(Arguments& to, const Addresses& parameters, const Addresses& gradients, const Addresses& outputs) {
  constexpr size_t layers = std::extent_v<decltype(to.layers)>;
  if (parameters.size() != 2 * layers || outputs.size() != layers ||
      (!gradients.empty() && gradients.size() != 2 * layers)) {
    throw std::invalid_argument("image model: wrong number of addresses");
  }
  for (size_t l = 0; l < layers; ++l) {
    to.layers[l].weight = pointer(parameters[2 * l]);
    to.layers[l].bias = pointer(parameters[2 * l + 1]);
    to.layers[l].weight_grad = gradients.empty() ? nullptr : pointer(gradients[2 * l]);
    to.layers[l].bias_grad = gradients.empty() ? nullptr : pointer(gradients[2 * l + 1]);
    to.outputs[l] = pointer(outputs[l]);
  }
}

// `shape`: images, channels, depth. Without `gradients` it is the forward pass.
void encoder_pass(std::array<int64_t, 3> shape, uintptr_t image, bool bytes, const Addresses& parameters,
                  const Addresses& outputs, uintptr_t grad, const Addresses& gradients, uintptr_t image_grad,
                  const std::string& dtype, int threads, const std::string& isa) {
  const auto& model = model_of(APV_FAST_PICK(isa_of(isa), encoder), dtype);
  EncoderArguments x{};
  x.images = shape[0], x.channels = shape[1], x.depth = shape[2];
  x.bytes = bytes;
  x.image = pointer(image), x.grad = pointer(grad), x.image_grad = pointer(image_grad);
  x.threads = usable_threads(threads);
  set_layers(x, parameters, gradients, outputs);
  run(gradients.empty() ? model.forward : model.backward, x);
}

// `shape`: images, features, channels, depth.
void decoder_pass(std::array<int64_t, 4> shape, uintptr_t feat, const Addresses& parameters, const Addresses& outputs,
                  uintptr_t grad, const Addresses& gradients, uintptr_t feat_grad, const std::string& dtype,
                  int threads, const std::string& isa) {
  const auto& model = model_of(APV_FAST_PICK(isa_of(isa), decoder), dtype);
  DecoderArguments x{};
  x.images = shape[0], x.features = shape[1], x.channels = shape[2], x.depth = shape[3];
  x.feat = pointer(feat), x.grad = pointer(grad), x.feat_grad = pointer(feat_grad);
  x.threads = usable_threads(threads);
  set_layers(x, parameters, gradients, outputs);
  run(gradients.empty() ? model.forward : model.backward, x);
}

}  // namespace

void bind_image_model(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("encoder_pass", &encoder_pass, py::call_guard<py::gil_scoped_release>(),
             "A pass over the encoder, backward if there are gradients to write.", py::kw_only(), py::arg("shape"),
             py::arg("image"), py::arg("bytes"), py::arg("parameters"), py::arg("outputs"), py::arg("grad") = 0,
             py::arg("gradients") = Addresses(), py::arg("image_grad") = 0, py::arg("dtype"), py::arg("threads"),
             py::arg("isa"));
  module.def("decoder_pass", &decoder_pass, py::call_guard<py::gil_scoped_release>(),
             "A pass over the decoder, backward if there are gradients to write.", py::kw_only(), py::arg("shape"),
             py::arg("feat"), py::arg("parameters"), py::arg("outputs"), py::arg("grad") = 0,
             py::arg("gradients") = Addresses(), py::arg("feat_grad") = 0, py::arg("dtype"), py::arg("threads"),
             py::arg("isa"));
}

}  // namespace apv_fast
