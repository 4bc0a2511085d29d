// Where the backward kernel's state lies, in shared memory and in the workspace, and who owns which weights.
#pragma once

#include "product.h"

namespace apv_fast::cuda {

// Offsets in bytes, computed on the host.
struct BackwardPlan {
  int64_t shared_partial, shared_normed, shared_before, shared_grad_deter, shared_grad, shared_rest, shared_carry,
      shared_scales, shared_sums, shared_y, shared_x, shared_probs, shared_latent, shared_stats, shared_rstd,
      shared_means, shared_keep, shared_weights;
  int64_t counter, stats, y, parts, x, zeroed, sums, weights;
};

template <class X>
APV_HD BackwardPlan plan_backward(const Sizes& n, int blocks) {
  const int64_t items = X::kItems * sizeof(float);
  const int deter = slots(n.deter_tiles(), blocks), hidden = slots(n.hidden_tiles(), blocks);
  const int64_t groups = int64_t{slots(n.groups(), blocks)} * X::kRows * n.group_width() * sizeof(float);
  BackwardPlan p{};
  Arena shared;
  p.shared_partial = shared.take(X::kWarps * X::kSlabsAtOnce * items);
  p.shared_normed = shared.take(deter * 3 * items);
  p.shared_before = shared.take(deter * items);
  p.shared_grad_deter = shared.take(deter * items);
  p.shared_grad = shared.take(deter * 3 * items);
  p.shared_rest = shared.take(deter * items);
  p.shared_carry = shared.take(deter * items);
  p.shared_scales = shared.take(deter * 6 * kTile * sizeof(float));
  p.shared_sums = shared.take(deter * 6 * X::kWorkers * sizeof(float));
  p.shared_y = shared.take(hidden * items);
  p.shared_x = shared.take(hidden * items);
  p.shared_probs = shared.take(groups);
  p.shared_latent = shared.take(groups);
  p.shared_stats = shared.take(n.C ? groups : 2 * groups);
  p.shared_rstd = shared.take(X::kRows * sizeof(float));
  p.shared_means = shared.take(X::kRows * sizeof(Pair));
  p.shared_keep = shared.take(2 * X::kRows * sizeof(float));
  p.shared_weights = shared.used;
  Arena workspace;
  p.counter = workspace.take(128);
  p.stats = workspace.take(buffer_chunks(n.stats_steps(), X::kTiles) * sizeof(Quad));
  p.y = workspace.take(buffer_chunks(n.hidden_steps(), X::kTiles) * sizeof(Quad));
  p.parts = workspace.take(buffer_chunks(n.gate_steps(), X::kTiles) * sizeof(Quad));
  p.x = workspace.take(buffer_chunks(n.hidden_steps(), X::kTiles) * sizeof(Quad));
  p.zeroed = workspace.used;
  p.sums = workspace.take(int64_t{X::kRows} * n.deter_tiles() * sizeof(Pair));
  p.weights = workspace.used;
  return p;
}

struct BackwardShares {
  Share input, deter, obs, dist, stoch;  // deter and obs: the same tiles
  Division rest;

  APV_HD BackwardShares(const Sizes& n, const Division& division) : rest(division) {
    input = rest.take(n.hidden_tiles(), n.gate_steps() * kLanes, false);
    deter = rest.take(n.deter_tiles(), n.gate_steps() * kLanes, false);
    obs = rest.take(n.deter_tiles(), n.hidden_steps() * kLanes, false);
    dist = rest.take(n.hidden_tiles(), n.stats_steps() * kLanes, true);
    stoch = rest.take(n.groups(), n.group_tiles() * n.hidden_steps() * kLanes, true);
  }
};

}  // namespace apv_fast::cuda
