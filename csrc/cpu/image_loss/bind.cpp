// apv_fast._C.image: the loss of images and its gradient, or the normalised images.

#include "image_loss.h"

#include <vector>

#include "../../module.h"
#include "../parts/binding.h"

namespace apv_fast {
namespace {

void image(bool of_loss, int64_t count, int64_t images, double scale, double constant, Address bytes, Address mean,
           Address loss, Address out, int threads, const std::string& dtype) {
  require(count >= 0 && images >= 0, "image_loss: sizes must not be negative");
  ImageProblem p{};
  p.count = count, p.images = images, p.scale = scale, p.constant = constant;
  p.threads = threads_for(count, threads);
  p.image = pointer<const uint8_t*>(bytes), p.mean = pointer(mean);
  p.loss = pointer(loss), p.out = pointer(out);
  std::vector<double> partial(of_loss ? (count + kImageBlock - 1) / kImageBlock : 0);
  p.partial = partial.data();
  const Isa chosen = isa_in_use();
  const auto& table = of_loss ? APV_FAST_PICK(chosen, image_loss) : APV_FAST_PICK(chosen, normalize_image);
  of_dtype(table, dtype, "image_loss")(p);
}

}  // namespace

void bind_image_loss(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("image", &image, py::call_guard<py::gil_scoped_release>(),
             "The image loss and `scale` times its gradient, each unless its address is 0, or the normalised image.",
             py::kw_only(), py::arg("of_loss"), py::arg("count"), py::arg("images"), py::arg("scale"),
             py::arg("constant"), py::arg("image"), py::arg("mean"), py::arg("loss"), py::arg("out"),
             py::arg("threads"), py::arg("dtype"));
}

}  // namespace apv_fast
