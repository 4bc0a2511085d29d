// The plain C interface: one structure that describes a scan, filled by apv_fast/cuda/parts/library.py field by field. All
// fields have eight bytes; addresses are of tensors on the device; strides count elements.
#pragma once

#include <cstdint>

#include "device.h"

extern "C" {

struct ApvMatrix {  // bfloat16
  const apv_fast::cuda::Half* data;
  int64_t row, column;  // strides
};

struct ApvScan {
  // Sizes; `batch` rows of the tensors from the pointers on, at most 64, beginning at row `first_row` of the noise.
  int64_t batch, length, deter, hidden, stoch, discrete, first_row;
  double min_std;
  // Set by apv_scan_plan.
  int64_t blocks, shared_bytes, workspace_bytes;

  // Weights, apv_fast.recurrence.phases.ScanWeights.
  ApvMatrix stoch_weight, gru_weight, obs_weight, dist_weight;  // [H, L] [3D, H + D] [H, D] [M, H]
  const apv_fast::cuda::Half *gru_bias, *norm_weight, *norm_bias, *dist_bias;

  // ScanInputs and ScanStart.
  const apv_fast::cuda::Half *input_x, *input_obs;  // [B, T, H]
  const uint8_t* keep;                              // [B, T]
  const float* start;                               // [B, D]
  const float* noise;                               // [B, T, S, C] or [B, T, S], or null
  const int64_t* seed;                              // or null; both null: modes

  // Trace: the forward pass writes it, the backward pass reads it.
  float *deter_trace, *stoch_trace, *stats_trace;  // [B, T, D] [B, T, L] [B, T, M]
  apv_fast::cuda::Half* x_trace;                   // [B, T, H]
  float *parts_trace, *norm_trace;                 // [B, T, 3D] [B, T, 2]
  apv_fast::cuda::Half* y_trace;                   // [B, T, H]

  // TraceGrads; each may be null.
  const float *grad_deter, *grad_stoch, *grad_stats;

  // ScanGrads.
  apv_fast::cuda::Half *dx, *dparts, *dy, *dstats;  // [B, T, H] [B, T, 3D] [B, T, H] [B, T, M]
  float* dstart;                                    // [B, D]
  float *dnorm_weight, *dnorm_bias;                 // [3D]
  int64_t accumulate;                               // add to the last two instead of writing them

  void* workspace;  // workspace_bytes on the device
};

}  // extern "C"
