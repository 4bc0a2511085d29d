// One step of filtering for acting: one RSSM, or two of which the second sees the first, and perhaps an actor; B rows.
//
// A model's step (apv_fast/reference/rssm.py defines it), z, h and the action a masked where a sequence begins:
//
//     x = elu(W_in [z, a] + b)  |  parts = W_gru [x, h] + b  |  h' = gates(LayerNorm(parts), h)
//     y = elu(W_obs [h', e] + b)  |  stats = W_dist y + b, z' = sample(stats)      the posterior, e what it sees
//     y = elu(W_out h' + b)       |  stats = W_dist y + b, z' = sample(stats)      the prior
//
// One OpenMP region for all of it. Products split their units among the threads (few_rows.h), what follows splits the
// rows, with a barrier in between. Weights are read as they lie: 24 million numbers for both models and the actor at
// full size.
#pragma once

#include <cstdint>

#include "../parts/kernel.h"
#include "../parts/network.h"

namespace apv_fast {

// A distribution's two layers and, wide, where its results go; no weights: absent.
struct StepHead {
  LayerWeights hidden, dist;
  NoiseSource noise;    // [B, L]; none: the mode
  void *stoch, *stats;  // [B, L], [B, M]

  APV_FAST_INLINE bool there() const { return hidden.weight != nullptr; }
};

// D deter, H hidden, S·C stoch and discrete (C = 0: Gaussian). Contiguous; operands' dtype but for what is "wide".
//
// Columns that see one-hots may be given once more, turned ("rows of"): what is not zero is then looked up, and the
// weight is read without them. Null: it is read as a whole.
struct StepModel {
  int64_t deter, hidden, stoch, discrete, inputs, actions, embed;  // inputs: columns of img_in's weight
  bool sees_below;  // the posterior sees [embed, stoch and deter of the model before]
  double min_std;
  LayerWeights img_in, gru;
  const void* img_in_rows;   // [L, H], of img_in's columns for z
  const void* obs_out_rows;  // [L', H], of the posterior's columns for the z of the model before, L' wide
  const void *norm_weight, *norm_bias;
  const void *before_deter, *before_stoch, *action;  // wide: [B, D], [B, L], [B, A]
  const void* embed_in;                              // [B, E]
  void* after_deter;                                 // wide: [B, D]
  StepHead post, prior;

  APV_FAST_INLINE int64_t latents() const { return discrete ? stoch * discrete : stoch; }
  APV_FAST_INLINE int64_t statistics() const { return discrete ? stoch * discrete : 2 * stoch; }
  APV_FAST_INLINE int64_t features() const { return latents() + deter; }
};

struct StepProblem {
  int64_t rows, models;
  StepModel model[2];
  const uint8_t* is_first;  // [B], or null: nothing begins
  // An actor on the features of the last model's posterior; no layers: none. The mode without noise.
  int64_t layers, actions;
  LayerWeights layer[kMostLayers], head;
  const void* actor_rows;  // [L, U], of the first layer's columns for z
  bool one_hot_actions;
  double min_std;
  NoiseSource action_noise;  // wide: [B, A]
  void* action_out;          // wide: [B, A]
  int threads;

  APV_FAST_INLINE int64_t heads() const { return one_hot_actions ? actions : 2 * actions; }
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Pass<StepProblem>> filter_step;)

}  // namespace apv_fast
