// The encoder and the decoder of images: one call a pass over all layers. See conv_layer.h for how, and
// apv_fast/reference/image_model.py for what.
#pragma once

#include <cstdint>

#include "../parts/kernel.h"

namespace apv_fast {

// A layer's parameters in PyTorch's order and where their gradients go; all of the type that T's sums have (Real).
struct LayerParameters {
  const void *weight, *bias;
  void *weight_grad, *bias_grad;
};

// T: what the products are in. Images and features have their channels last and are contiguous, as everything is here.
struct EncoderArguments {
  int64_t images, channels, depth;
  bool bytes;         // the images are uint8
  const void* image;  // [images, 64, 64, channels], uint8 or T
  LayerParameters layers[4];
  void* outputs[4];   // [images, side, side, depth·2^l] of T, sides 31, 14, 6, 2; the last one of Real
  const void* grad;   // of the last output, Real
  void* image_grad;   // T, or nullptr if it is not wanted
  int threads;        // usable_threads' answer
};

struct DecoderArguments {
  int64_t images, features, channels, depth;
  const void* feat;  // [images, features] of T
  LayerParameters layers[5];
  void* outputs[5];  // T: [images, 32·depth]; [images, side, side, depth·(4, 2, 1) or channels], sides 5, 13, 30, 64
  const void* grad;  // of the last output, T
  void* feat_grad;   // [images, features] of Real
  int threads;
};

template <class Arguments>
struct ImageModel {
  Pass<Arguments> forward, backward;
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<ImageModel<EncoderArguments>> encoder;
                      extern const ByDtype<ImageModel<DecoderArguments>> decoder;)

}  // namespace apv_fast
