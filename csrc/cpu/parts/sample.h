// Samples of all latents of a batch and their gradient (see latent.h), and Gumbel noise by itself; float32 or float64.
// Tensors are contiguous; results do not depend on `threads`.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace apv_fast {

struct SampleProblem {
  int64_t rows, stoch, discrete;  // discrete = 0: Gaussian
  double min_std;
  int threads;
  const void *stats, *noise;  // [rows, M], [rows, L] or null
  const int64_t* seed;        // instead of noise, or null; both null: modes
  const void* grad;           // [rows, L]: of the samples, for the way back; null forward
  void* out;                  // [rows, L], or [rows, M] on the way back
};

struct GumbelProblem {
  int64_t count;
  int threads;
  const int64_t* seed;
  void* out;  // [count]
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Function<SampleProblem>> sample;
                      extern const ByDtype<Function<GumbelProblem>> draw_gumbel;)

}  // namespace apv_fast
