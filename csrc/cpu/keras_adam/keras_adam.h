// A step of Keras' Adam with its clip by the global norm: a pass over the gradients, a pass over everything.
#pragma once

#include <cstdint>

#include "../parts/kernel.h"

namespace apv_fast {

// One weight, its gradient and its moments, in the same order in memory. No gradient: the weight only decays.
struct AdamWeight {
  void* weight;
  const void* gradient;
  void *first, *second;
  int64_t size;
};

// So many numbers of one weight, or fewer where it ends.
struct AdamBlock {
  int64_t weight, begin, end;
};

constexpr int64_t kAdamBlock = 32768;

struct AdamProblem {
  const AdamWeight* weights;
  const AdamBlock* blocks;
  int64_t count;  // blocks
  double size, eps, clip, decay, beta1, beta2;  // size: the rate with both corrections
  int threads;
  double* partial;  // [count]
  double* norm;     // leaves the gradients' norm
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Function<AdamProblem>> keras_adam;)

}  // namespace apv_fast
