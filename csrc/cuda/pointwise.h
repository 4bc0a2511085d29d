// The arithmetic between the products, for one number each: bfloat16, activations, gates and their backward,
// LayerNorm's statistics, the latents' sample. The same code on the GPU and, in the tests, on the CPU.
#pragma once

#include <cmath>

#include "device.h"

namespace apv_fast::cuda {

constexpr float kLayerNormEps = 1e-3f;
constexpr float kUpdateBias = -1.0f;

APV_HD float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

APV_HD uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

APV_HD float widen(Half h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

// To the nearest bfloat16, ties to even; NaN stays NaN.
APV_HD Half narrow(float x) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7fc0;
  return static_cast<Half>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

APV_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
APV_HD float elu(float x) { return x > 0 ? x : expm1f(x); }
APV_HD float elu_grad(float y) { return y > 0 ? 1.0f : y + 1.0f; }  // from the output

// Of numbers that come as sets with a known mean: sums of their deviations from a pivot near the common mean, by the
// sets' means, and the sets' own squared deviations. Merging is adding (Chan et al. 1979, with a shared pivot).
struct Moments {
  float first, second, within;

  APV_HD void add(float count, float mean, float squares) {  // mean: less the pivot
    first += count * mean;
    second += count * mean * mean;
    within += squares;
  }
};

struct Norm {
  float mean, rstd;
};

APV_HD Norm norm_of(const Moments& m, float count, float pivot) {
  const float shift = m.first / count;
  const float variance = (m.within + fmaxf(m.second - m.first * shift, 0.0f)) / count;
  return {pivot + shift, 1.0f / sqrtf(variance + kLayerNormEps)};
}

// The three rows of one unit after LayerNorm.
struct Gates {
  float reset, candidate, update;  // candidate before the reset and tanh; the others are sigmoids
};

APV_HD Gates gates(float reset, float candidate, float update) {
  return {sigmoid(reset), candidate, sigmoid(update + kUpdateBias)};
}

APV_HD float next_deter(const Gates& g, float before) {
  return g.update * tanhf(g.reset * g.candidate) + (1 - g.update) * before;
}

// Gradients of what LayerNorm gave, from that of next_deter's result.
APV_HD void gates_backward(const Gates& g, float before, float grad, float (&normed)[3]) {
  const float c = tanhf(g.reset * g.candidate);
  const float dc = grad * g.update * (1 - c * c);
  normed[0] = dc * g.candidate * g.reset * (1 - g.reset);
  normed[1] = dc * g.reset;
  normed[2] = grad * (c - before) * g.update * (1 - g.update);
}

APV_HD float deviation(float raw, float min_std) { return 2 * sigmoid(raw / 2) + min_std; }

APV_HD float deviation_grad(float raw) {
  const float s = sigmoid(raw / 2);
  return s * (1 - s);
}

}  // namespace apv_fast::cuda
