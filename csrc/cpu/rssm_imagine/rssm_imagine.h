// Imagination: H steps of the prior from N start states, and the walk back. With an actor in the loop that is
// rssm_imagine, with given actions rssm_rollout. They share this folder because they are one kernel: a rollout is
// imagination without the phases of the actor.
//
// One step forward (apv_fast/reference/rssm_rollout.py defines it), z and h the state before it:
//
//     u_1 = elu(W_1 [z, h] + b_1), ..., a = sample(heads(u))       the actor, if there is one
//     x = elu(W_in [z, a] + b)  |  parts = W_gru [x, h] + b  |  h' = gates(LayerNorm(parts), h)
//     y = elu(W_out h' + b)     |  stats = W_dist y + b        |  z' = sample(stats)
//
// and one back, with the carry dh and dx of the step after:
//
//     dstats = dstats' + sample'(dz' + W_stochᵀ dx⁺)  |  dy = elu'(y)·W_distᵀ dstats  |  dh = dh' + W_outᵀ dy + carry
//     dparts = LayerNorm'(gates'(dh))  |  [dx, carry] = W_gruᵀ dparts, dx ·= elu'(x), carry += (1 - g)·dh
//     da = da' + W_actionᵀ dx;  dhead = sample'(da);  du_l = elu'(u_l)·W_{l+1}ᵀ du_{l+1}
//
// No step looks at another row, so every thread takes rows of its own through all steps: no barrier but the one behind
// the packing of the weights, and no sum that depends on the number of threads. What sees a latent is a sum of its
// nonzero numbers' rows (sparse.h): of S rows for one-hots, where a product would take S·C.
#pragma once

#include <cstdint>

#include "../parts/kernel.h"
#include "../parts/network.h"

namespace apv_fast {

// N rows, H steps; D deter, H hidden, S·C stoch and discrete (C = 0: Gaussian), L = S·C or S, M = S·C or 2·S, A
// actions. "wide": float, or double where the operands are double. A tensor of the steps is [H, N, ...] or,
// batch-first, [N, H, ...]; everything is contiguous; null where something is absent or not wanted.
struct ImagineProblem {
  int64_t steps, rows, deter, hidden, stoch, discrete, inputs, actions;  // inputs: columns of img_in's weight
  double latent_min_std, min_std;
  bool batch_first, one_hot_actions;
  int threads;
  const void *img_in_weight, *img_in_bias, *gru_weight, *gru_bias, *norm_weight, *norm_bias;
  const void *img_out_weight, *img_out_bias, *dist_weight, *dist_bias;
  // The actor: its hidden layers, then its head [heads, U], A rows for the loc or the logits and A for the scale. No
  // layers: actions are given.
  int64_t layers;
  LayerWeights layer[kMostLayers], head;
  const void *start_deter, *start_stoch;  // wide: [N, D], [N, L]
  NoiseSource noise, action_noise;        // wide: [.., L], [.., A]
  const void* input_action;               // operands' dtype
  // Outputs, wide: D, L, M and A; and what the way back needs: operands' dtype H, 3D, H, U of each layer; wide 2,
  // heads.
  void *deter_trace, *stoch_trace, *stats_trace, *action_trace;
  void *x_trace, *parts_trace, *y_trace, *norm_trace, *head_trace;
  void* layer_trace[kMostLayers];
  // Backward: gradients of the outputs, wide; null: zeros.
  const void *grad_deter, *grad_stoch, *grad_stats, *grad_action;
  // Gradients that it leaves. Of preactivations, operands' dtype: H, 3D, H, M (null: not wanted), heads, U of each
  // layer.
  void *dx, *dparts, *dy, *dstats, *dhead;
  void* dlayer[kMostLayers];
  void *dstart_deter, *dstart_stoch, *daction;  // wide: [N, D]; [N, L] and [.., A] or null
  void *dnorm_weight, *dnorm_bias;              // wide: [3D], or null

  APV_FAST_INLINE int64_t latents() const { return discrete ? stoch * discrete : stoch; }
  APV_FAST_INLINE int64_t statistics() const { return discrete ? stoch * discrete : 2 * stoch; }
  APV_FAST_INLINE int64_t heads() const { return one_hot_actions ? actions : 2 * actions; }
  // Which row of a tensor of the steps holds step t of row n.
  APV_FAST_INLINE int64_t at(int64_t t, int64_t n) const { return batch_first ? n * steps + t : t * rows + n; }
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Pass<ImagineProblem>> imagine_forward;
                      extern const ByDtype<Pass<ImagineProblem>> imagine_backward;)

}  // namespace apv_fast
