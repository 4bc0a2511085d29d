// The recurrence of the posterior scan, forward and backward; apv_fast/recurrence/phases.py defines it, phase by phase.
//
// One OpenMP region a scan with a barrier a phase. Phases are either products, which split the columns of a packed
// weight among the threads, or work on whole rows of the batch, which split the rows. Neither changes any sum.
#pragma once

#include <cstdint>

#include "../parts/kernel.h"

namespace apv_fast {

// A weight [rows, columns] of the operands' dtype, in elements from one row or column to the next.
struct Weight {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
};

// B batch, T length, D deter, H hidden, S·C stoch and discrete (C = 0: Gaussian), L = S·C or S, M = S·C or 2·S.
// "wide": float, or double where the operands are double. Everything is contiguous but the weights.
struct ObserveProblem {
  int64_t batch, length, deter, hidden, stoch, discrete;
  double min_std;
  int threads;
  Weight weight_stoch, weight_gru, weight_obs, weight_dist;           // [H, L], [3D, H + D], [H, D], [M, H]
  const void *gru_bias, *norm_weight, *norm_bias, *dist_bias;         // operands' dtype: [3D] three times, [M]
  const void *input_x, *input_obs;                                    // forward, operands' dtype: [B, T, H]
  const uint8_t* keep;                                                // [B, T]
  const void *start, *noise;                                          // wide: [B, D]; [B, T, L] or null
  const int64_t* seed;                                                // instead of noise, or null; both null: modes
  void *deter_trace, *stoch_trace, *stats_trace, *parts_trace, *norm_trace;  // wide: [B, T, D], L, M, 3D and 2
  void *x_trace, *y_trace;                                            // operands' dtype: [B, T, H]
  const void *grad_deter, *grad_stoch, *grad_stats;                   // backward, wide: like the traces; null: zeros
  void *dx, *dparts, *dy, *dstats;                                    // operands' dtype: [B, T, H], 3D, H and M
  void *dstart, *dnorm_weight, *dnorm_bias;                           // wide: [B, D], [3D] twice

  APV_FAST_INLINE int64_t latents() const { return discrete ? stoch * discrete : stoch; }
  APV_FAST_INLINE int64_t statistics() const { return discrete ? stoch * discrete : 2 * stoch; }
  APV_FAST_INLINE bool sampled() const { return noise != nullptr || seed != nullptr; }
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Pass<ObserveProblem>> observe_forward;
                      extern const ByDtype<Pass<ObserveProblem>> observe_backward;)

}  // namespace apv_fast
