// The gradient of a weight that sees one-hot latents of the step before, without the product that it is:
//
//     out[h, l] = sum over b, t of keep[b, t]·grad[b, t, h]·before[b, t, l],    before = start, then stoch of t - 1
#pragma once

#include <cstdint>

#include "kernel.h"

namespace apv_fast {

// L = S·C of `groups` S of `classes` C. grad and out are T = float or Bf16; stoch and start are floats, stoch one-hot.
struct OneHotGradient {
  const void* grad;      // [B, T, H], contiguous
  const float* stoch;    // [B, T, L], contiguous
  const float* start;    // [B, L], contiguous, of any values
  const uint8_t* first;  // [B, T], not keep
  void* out;             // [H, L], rows out_stride apart
  int64_t batch, length, hidden, groups, classes, out_stride;
  int threads;
};

// float64 is nothing.
APV_FAST_FOR_EACH_ISA(extern const ByDtype<Pass<OneHotGradient>> onehot_gradient;)

}  // namespace apv_fast
