// The λ-return and its gradient. Tensors are contiguous; results do not depend on `threads`.
#pragma once

#include <cstdint>

#include "../parts/kernel.h"

namespace apv_fast {

struct ReturnsProblem {
  int64_t horizon, n;
  double lambda;
  int threads;
  const void *reward, *value, *discount, *bootstrap;  // [H, N] three times, [N]
  void* out;                                          // [H, N]: forward
  const void* grad;                                   // [H, N]: of the returns, for the way back; null forward
  void *grad_reward, *grad_value, *grad_discount, *grad_bootstrap;
  void* scratch;  // [threads, H + 1, 64 bytes]
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Function<ReturnsProblem>> lambda_return;)

}  // namespace apv_fast
