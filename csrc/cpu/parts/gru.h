// LayerNorm and the gates of the GRU, a row and a vector of units at a time. On files of this kind see simd.h.
#pragma once

#include "math.h"
#include "operands.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// LayerNorm over all three gates together, and the gates of one unit.
constexpr double kLayerNormEps = 1e-3, kUpdateBias = -1;

template <class Real>
struct Norm {
  Real mean, rstd;
};

// Mean and 1/√(variance + ε) of a row, in two passes.
template <class Real>
inline Norm<Real> layer_norm(const Real* row, int64_t n) {
  Vector<Real> total = {};
  for (int64_t i = 0; i < n; i += kWidth<Real>) total += load_some(row + i, n - i);
  const Real mean = sum(total) / n;
  Vector<Real> squares = {};
  int64_t i = 0;
  for (; i + kWidth<Real> <= n; i += kWidth<Real>) {
    const auto difference = load(row + i) - mean;
    squares += difference * difference;
  }
  Real rest = 0;
  for (; i < n; ++i) rest += (row[i] - mean) * (row[i] - mean);
  const Real variance = (sum(squares) + rest) / n + Real(kLayerNormEps);
  if constexpr (sizeof(Real) == 8) return {mean, 1 / __builtin_sqrt(variance)};
  return {mean, 1 / __builtin_sqrtf(variance)};
}

template <class Real>
struct Gates {
  Vector<Real> normed[3];  // parts after mean and deviation: reset, candidate, update
  Vector<Real> reset, candidate, update, proposal;
};

// Of the units from `unit` on, up to a vector.
template <class T>
inline Gates<Wide<T>> gates(const Wide<T>* parts, const Norm<Wide<T>>& norm, const Widened<T>& scale,
                            const Widened<T>& offset, int64_t deter, int64_t unit) {
  Gates<Wide<T>> g;
  Vector<Wide<T>> z[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t at = i * deter + unit;
    g.normed[i] = (load_some(parts + at, deter - unit) - norm.mean) * norm.rstd;
    z[i] = g.normed[i] * scale.at(at) + offset.at(at);
  }
  g.reset = sigmoid(z[0]);
  g.candidate = z[1];
  g.update = sigmoid(z[2] + Wide<T>(kUpdateBias));
  g.proposal = tanh(g.reset * g.candidate);
  return g;
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
