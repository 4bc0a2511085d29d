// What imagination's two directions share: how they read its problem, and layers. On files of this kind see simd.h.
#pragma once

#include "../parts/actor_sample.h"
#include "../parts/gru.h"
#include "../parts/operands.h"
#include "rssm_imagine.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// A thread that shares its rows with nobody.
constexpr Team kAlone = {0, 1};

// A row as states have it; `room` is used where it lies otherwise.
inline const float* widened(const float* row, int64_t, float*) { return row; }
inline const double* widened(const double* row, int64_t, double*) { return row; }
inline const float* widened(const Bf16* row, int64_t n, float* room) {
  for (int64_t j = 0; j < n; j += kWidth<float>) store_some(room + j, load_some(row + j, n - j), n - j);
  return room;
}

inline LatentShape latent_shape(const ImagineProblem& p) { return {p.stoch, p.discrete, p.latent_min_std}; }

inline ActionKind action_kind(const ImagineProblem& p) { return {p.actions, p.one_hot_actions, p.min_std}; }

// Row `at` of noise in rows of `width`.
template <class Real>
inline LatentNoise<Real> noise_at(const NoiseSource& x, int64_t at, int64_t width) {
  const int64_t first = at * width;
  return {x.values ? static_cast<const Real*>(x.values) + first : nullptr, x.seed, first};
}

// Rows [rows.begin, rows.end) of operands, from `column` on.
template <class T>
inline Operands<T> view(Operands<T> all, const Range& rows, int64_t column = 0) {
  all.data += rows.begin * all.stride + column;
  all.rows = rows.end - rows.begin;
  return all;
}

// A dense layer: out = W in + b.
template <class T>
struct Layer {
  Packed<T> weight;  // [inputs, units]
  Widened<T> bias;

  Layer(Arena& arena, int64_t inputs, int64_t units) : weight(arena, inputs, units), bias(arena, units) {}

  // `from` is [units, stride], of which the columns from `first` on are packed.
  void fill(const Team& team, const void* from, const void* of_bias, int64_t stride, int64_t first = 0) const {
    weight.fill(team, static_cast<const T*>(from) + first, 1, stride);
    if (team.rank == 0) bias.fill(of_bias);
  }
};

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
