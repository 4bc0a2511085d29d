// The loss of images and its gradient, image_loss; and images as the model sees them, normalize_image. Tensors are
// contiguous; "wide" is float, or double where the tensors' dtype is. Results do not depend on `threads`.
#pragma once

#include <cstdint>

#include "../parts/kernel.h"

namespace apv_fast {

struct ImageProblem {
  int64_t count, images;  // numbers in all, and images
  double scale;           // of the gradient: the cotangent / images
  double constant;        // that the loss has beside the squares
  int threads;
  const uint8_t* image;  // [count]
  const void* mean;      // [count]
  double* partial;       // [(count + kImageBlock - 1) / kImageBlock]
  void* loss;            // wide: []; null: not wanted
  void* out;             // [count]: the mean's gradient, or the normalised image; null: not wanted
};

constexpr int64_t kImageBlock = 8192;

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Function<ImageProblem>> image_loss;
                      extern const ByDtype<Function<ImageProblem>> normalize_image;)

}  // namespace apv_fast
