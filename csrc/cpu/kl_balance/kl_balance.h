// The balanced KL loss and its gradient: kl_balance, and kl_balance_normal. Tensors are contiguous; "wide" is float, or
// double where the tensors' dtype is. Results do not depend on `threads`.
#pragma once

#include <cstdint>

#include "../parts/kernel.h"

namespace apv_fast {

struct KlProblem {
  int64_t steps, stoch, classes;  // classes = 0: Gaussian
  double weight_p, weight_q;      // of the halves that train p and q
  double free;
  bool per_step;  // compare with `free` every step, not their mean
  int threads;
  const void *p[2], *q[2];      // [steps, S, C] each, or means and deviations [steps, S]
  void *value, *mean, *loss;    // wide: [steps], [], []; forward leaves them, backward reads `value` and `mean`
  const void* grad;             // wide: []: the loss's cotangent, for the way back; null forward
  void *grad_p[2], *grad_q[2];  // like p and q
  void* scratch;                // wide: [threads, 2·classes]
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Function<KlProblem>> kl_balance;)

}  // namespace apv_fast
