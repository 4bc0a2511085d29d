// Where the forward kernel's state lies, in shared memory and in the workspace, and who owns which weights.
#pragma once

#include "product.h"

namespace apv_fast::cuda {

// Offsets in bytes, computed on the host.
struct ForwardPlan {
  int64_t shared_partial, shared_hidden, shared_parts, shared_deter, shared_x, shared_obs, shared_noise, shared_latent,
      shared_norm, shared_gates, shared_bias, shared_keep, shared_weights;
  int64_t counter, x, deter, y, zeroed, moments, candidates, weights;
};

template <class X>
APV_HD ForwardPlan plan_forward(const Sizes& n, int blocks) {
  const int64_t items = X::kItems * sizeof(float);
  const int deter = slots(n.deter_tiles(), blocks), hidden = slots(n.hidden_tiles(), blocks);
  const int stats = slots(n.stats_tiles(), blocks);
  ForwardPlan p{};
  Arena shared;
  p.shared_partial = shared.take(X::kWarps * 3 * items);
  p.shared_hidden = shared.take(deter * 3 * items);
  p.shared_parts = shared.take(deter * 3 * items);
  p.shared_deter = shared.take(deter * items);
  p.shared_x = shared.take(hidden * items);
  p.shared_obs = shared.take(hidden * items);
  p.shared_noise = shared.take(stats * items);
  p.shared_latent = shared.take(int64_t{X::kRows} * n.S * sizeof(float));
  p.shared_norm = shared.take(X::kRows * sizeof(Pair));
  p.shared_gates = shared.take(deter * 9 * kTile * sizeof(float));
  p.shared_bias = shared.take(stats * kTile * sizeof(float));
  p.shared_keep = shared.take(2 * X::kRows * sizeof(float));
  p.shared_weights = shared.used;
  Arena workspace;
  p.counter = workspace.take(128);
  p.x = workspace.take(buffer_chunks(n.hidden_steps(), X::kTiles) * sizeof(Quad));
  p.deter = workspace.take(buffer_chunks(n.deter_steps(), X::kTiles) * sizeof(Quad));
  p.y = workspace.take(buffer_chunks(n.hidden_steps(), X::kTiles) * sizeof(Quad));
  p.zeroed = workspace.used;
  p.moments = workspace.take(int64_t{X::kRows} * n.deter_tiles() * sizeof(Pair));
  p.candidates = workspace.take(int64_t{X::kRows} * n.stats_tiles() * sizeof(Pair));
  p.weights = workspace.used;
  return p;
}

struct ForwardShares {
  Share gru, obs, dist, stoch;
  Division rest;

  APV_HD ForwardShares(const Sizes& n, const Division& division) : rest(division) {
    gru = rest.take(n.deter_tiles(), 3 * (n.hidden_steps() + n.deter_steps()) * kLanes, false);
    obs = rest.take(n.hidden_tiles(), n.deter_steps() * kLanes, true);
    dist = rest.take(n.stats_tiles(), n.hidden_steps() * kLanes, false);
    stoch = rest.take(n.hidden_tiles(), n.L(), true);
  }
};

}  // namespace apv_fast::cuda
