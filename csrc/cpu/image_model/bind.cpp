// apv_fast._C.encoder_… and decoder_…: passes over the image models. Tensors are contiguous.

#include "image_model.h"

#include <vector>

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

using List = std::vector<Address>;

template <class Arguments>
void set_layers(Arguments& to, const List& parameters, const List& gradients, const List& outputs) {
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
void encoder_pass(std::array<int64_t, 3> shape, Address image, bool bytes, const List& parameters,
                  const List& outputs, Address grad, const List& gradients, Address image_grad,
                  const std::string& dtype, int threads) {
  const auto& model = of_dtype(APV_FAST_PICK(isa_in_use(), encoder), dtype, "image model");
  EncoderArguments x{};
  x.images = shape[0], x.channels = shape[1], x.depth = shape[2];
  x.bytes = bytes;
  x.image = pointer(image), x.grad = pointer(grad), x.image_grad = pointer(image_grad);
  x.threads = usable_threads(threads);
  set_layers(x, parameters, gradients, outputs);
  run(gradients.empty() ? model.forward : model.backward, x);
}

// `shape`: images, features, channels, depth.
void decoder_pass(std::array<int64_t, 4> shape, Address feat, const List& parameters, const List& outputs,
                  Address grad, const List& gradients, Address feat_grad, const std::string& dtype, int threads) {
  const auto& model = of_dtype(APV_FAST_PICK(isa_in_use(), decoder), dtype, "image model");
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
             py::arg("gradients") = List(), py::arg("image_grad") = 0, py::arg("dtype"), py::arg("threads"));
  module.def("decoder_pass", &decoder_pass, py::call_guard<py::gil_scoped_release>(),
             "A pass over the decoder, backward if there are gradients to write.", py::kw_only(), py::arg("shape"),
             py::arg("feat"), py::arg("parameters"), py::arg("outputs"), py::arg("grad") = 0,
             py::arg("gradients") = List(), py::arg("feat_grad") = 0, py::arg("dtype"), py::arg("threads"));
}

}  // namespace apv_fast
