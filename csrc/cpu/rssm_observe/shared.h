// What the recurrence's two directions share: how they read its problem. On files of this kind see simd.h.
#pragma once

#include "../parts/gru.h"
#include "../parts/latent.h"
#include "../parts/operands.h"
#include "rssm_observe.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// A weight times the operands that the forward pass has, and its transpose times those of the backward pass.
template <class T>
inline void pack_weight(const Team& team, const Weight& w, const Packed<T>& packed) {
  packed.fill(team, w.data, w.column_stride, w.row_stride);
}

template <class T>
inline void pack_transposed(const Team& team, const Weight& w, const Packed<T>& packed) {
  packed.fill(team, w.data, w.row_stride, w.column_stride);
}

// The state that step t of row b started from, were it kept.
template <class Real>
inline const Real* state_before(const ObserveProblem& p, int64_t b, int64_t t) {
  return t == 0 ? row<Real>(p.start, b, p.deter) : row<Real>(p.deter_trace, b * p.length + t - 1, p.deter);
}

// The noise of all latents of row b at step t.
template <class Real>
inline LatentNoise<Real> latent_noise(const ObserveProblem& p, int64_t b, int64_t t) {
  const int64_t first = (b * p.length + t) * p.latents();
  return {p.noise ? static_cast<const Real*>(p.noise) + first : nullptr, p.seed, first};
}

inline LatentShape latent_shape(const ObserveProblem& p) { return {p.stoch, p.discrete, p.min_std}; }

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
