// Samples of the latents and their gradient, row by row, as apv_fast/recurrence/phases.py has them.
//
// Categorical, for each variable (C logits l), with Gumbel noise g or none (the mode):
//     z  = onehot(argmax(l + g))                       the first of equals; NaN counts as the largest, as in PyTorch
//     dl = dl' + p·(dz - sum p·dz),  p = softmax(l)    straight through; a mode has no gradient
// Gaussian, with standard normal noise e or none, from the mean and the preactivation r of std:
//     z     = mean + (2·sigmoid(r/2) + min_std)·e
//     dmean = dmean' + dz,  dr = dr' + dz·e·s·(1 - s),  s = sigmoid(r/2)
// where the primed gradients are those of the statistics themselves. A row is meant to be in the first-level cache;
// softmax is computed again for the gradient. See simd.h for what such a file may use.
#pragma once

#include "noise.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

struct LatentShape {
  int64_t stoch, discrete;  // discrete = 0: Gaussian
  double min_std;
};

// A row's noise: its numbers, or the seed of the whole call and the number of the row's first element; or nothing, for
// modes.
template <class Real>
struct LatentNoise {
  const Real* values;
  const int64_t* seed;
  int64_t first;

  bool none() const { return values == nullptr && seed == nullptr; }

  // Elements j, j + 1, ..., of which `left` are the row's.
  template <Noise kind>
  Vector<Real> at(int64_t j, int64_t left) const;
};

// ---- lanes

// Lanes 0, 1, 2, ...
template <class Real>
inline Vector<Real> lane_numbers() {
  Vector<Real> numbers;
  for (int i = 0; i < kWidth<Real>; ++i) numbers[i] = Real(i);
  return numbers;
}

// As many values as `left` says or a vector holds, `fill` in the lanes beyond.
template <class T>
inline Vector<Wide<T>> load_or(const T* from, int64_t left, Wide<T> fill) {
  if (left >= kWidth<Wide<T>>) return load(from);
  return lane_numbers<Wide<T>>() < Wide<T>(left) ? load(from, left) : splat(fill);
}

// As many lanes as `left` says or a vector holds.
template <class T>
inline void store_left(T* to, Vector<Wide<T>> x, int64_t left) {
  if (left >= kWidth<Wide<T>>) return store(to, x);
  store(to, x, left);
}

// The lanes `by` places further down, the first ones last.
template <int by, class V>
inline V rotate(V x) {
  constexpr int width = sizeof(V) / sizeof(x[0]);
#if defined(__clang__)
  V result;
  for (int i = 0; i < width; ++i) result[i] = x[(i + by) % width];
  return result;
#else
  std::conditional_t<sizeof(x[0]) == 8, Longs, Words> from;
  for (int i = 0; i < width; ++i) from[i] = (i + by) % width;
  return __builtin_shuffle(x, from);
#endif
}

// All lanes with each other, in halves: the result is in every lane, and in the order of simd.h's sum.
template <int half, class V, class Operation>
inline V fold(V x, const Operation& operation) {
  x = operation(x, rotate<half>(x));
  if constexpr (half > 1) return fold<half / 2>(x, operation);
  return x;
}

// The largest lane; unspecified where one is NaN.
template <class Real>
inline Real largest(const Vector<Real>& x) {
  return fold<kWidth<Real> / 2>(x, [](auto a, auto b) { return a < b ? b : a; })[0];
}

template <class Real>
inline Real largest(const Real* x, int64_t n) {
  const Real lowest = -Real(__builtin_inf());
  Vector<Real> top = splat(lowest);
  for (int64_t c = 0; c < n; c += kWidth<Real>) top = max(load_or(x + c, n - c, lowest), top);
  return largest<Real>(top);
}

// A sum of vectors, a few of which are added before they join it: rounding grows with n / 16 + 16 and not with n.
template <class V>
struct Total {
  V total = {}, part = {};
  int count = 0;

  void add(V x) {
    part += x;
    if (++count % 16 != 0) return;
    total += part;
    part = V{};
  }

  auto value() const {
    return fold<sizeof(V) / sizeof(total[0]) / 2>(V(total + part), [](V a, V b) { return a + b; })[0];
  }
};

template <class Real>
template <Noise kind>
inline Vector<Real> LatentNoise<Real>::at(int64_t j, int64_t left) const {
  if (values != nullptr) return load_or(values + j, left, Real(0));
  return noise_vector<kind, Real>(uint64_t(*seed), uint32_t(first + j));
}

// ---- forward

// argmax(logit + noise) of the variable whose logits begin at `begin`.
template <class Real>
inline int64_t choose(const Real* stats, const LatentNoise<Real>& noise, int64_t begin, int64_t classes) {
  const Real lowest = -Real(__builtin_inf());
  Vector<Real> best = splat(lowest), at = splat(Real(0));
  for (int64_t c = 0; c < classes; c += kWidth<Real>) {
    Vector<Real> score = load_or(stats + begin + c, classes - c, lowest);
    if (!noise.none()) score += noise.template at<Noise::gumbel>(begin + c, classes - c);
    const auto better = ~(score <= best) & (best == best);  // NaN is, and remains
    best = better ? score : best;
    at = better ? splat(Real(c)) : at;
  }
  at += lane_numbers<Real>();
  const Real top = largest<Real>(best == best ? best : splat(Real(__builtin_inf())));
  const auto equal = (best == top) | (best != best);
  const int64_t chosen = int64_t(-largest<Real>(equal ? -at : splat(lowest)));
  if (__builtin_expect(top < Real(__builtin_inf()), 1)) return chosen;
  // Infinite, or NaN, which comes first.
  const Real first_nan = -largest<Real>(best != best ? -at : splat(lowest));
  return first_nan < Real(classes) ? int64_t(first_nan) : chosen;
}

// The samples of one row: [S·C] or [S]; of categorical latents also the chosen classes [S], unless null.
template <class Real>
inline void sample_latents(const LatentShape& shape, const Real* stats, const LatentNoise<Real>& noise, Real* stoch,
                           int32_t* chosen) {
  if (shape.discrete != 0) {
    __builtin_memset(stoch, 0, sizeof(Real) * shape.stoch * shape.discrete);
    for (int64_t s = 0; s < shape.stoch; ++s) {
      const int64_t begin = s * shape.discrete, c = choose(stats, noise, begin, shape.discrete);
      stoch[begin + c] = 1;
      if (chosen != nullptr) chosen[s] = int32_t(c);
    }
    return;
  }
  for (int64_t j = 0; j < shape.stoch; j += kWidth<Real>) {
    const int64_t left = shape.stoch - j;
    Vector<Real> z = load_or(stats + j, left, Real(0));
    if (!noise.none()) {
      const Vector<Real> raw = load_or(stats + shape.stoch + j, left, Real(0));
      z += (Real(2) * sigmoid(raw * Real(0.5)) + Real(shape.min_std)) * noise.template at<Noise::normal>(j, left);
    }
    store_left(stoch + j, z, left);
  }
}

// ---- backward

// `left` values of a gradient, or zeros if there is none.
template <class Real>
inline Vector<Real> load_gradient(const Real* from, int64_t j, int64_t left) {
  return from != nullptr ? load_or(from + j, left, Real(0)) : Vector<Real>{};
}

template <class Real, class Write>
inline void categorical_backward(const LatentShape& shape, const Real* stats, const Real* grad, const Real* own,
                                 const Write& write) {
  const Real lowest = -Real(__builtin_inf());
  const int64_t classes = shape.discrete;
  for (int64_t begin = 0; begin < shape.stoch * classes; begin += classes) {
    const Real top = largest(stats + begin, classes);
    const auto power = [&](int64_t c) { return exp(load_or(stats + begin + c, classes - c, lowest) - top); };
    Total<Vector<Real>> total, weighted;
    for (int64_t c = 0; c < classes; c += kWidth<Real>) {
      const Vector<Real> e = power(c);
      total.add(e);
      weighted.add(e * load_or(grad + begin + c, classes - c, Real(0)));
    }
    const Real sum_of_powers = total.value(), mean = weighted.value() / sum_of_powers;
    for (int64_t c = 0; c < classes; c += kWidth<Real>) {
      const Vector<Real> p = power(c) / sum_of_powers;
      const Vector<Real> through = p * (load_or(grad + begin + c, classes - c, Real(0)) - mean);
      write(begin + c, load_gradient(own, begin + c, classes - c) + through, classes - c);
    }
  }
}

// The gradient of one row's statistics from that of its samples, `grad`, and their own, `own`; the latter may be null.
// Calls write(j, x, left): x holds the numbers j, j + 1, ..., of which `left` (it may exceed a vector) are there.
// Modes of categorical latents have no such gradient: not for them.
template <class Real, class Write>
inline void latents_backward(const LatentShape& shape, const Real* stats, const Real* grad,
                             const LatentNoise<Real>& noise, const Real* own, const Write& write) {
  if (shape.discrete != 0) {
    categorical_backward(shape, stats, grad, own, write);
    return;
  }
  for (int64_t j = 0; j < shape.stoch; j += kWidth<Real>) {
    const int64_t left = shape.stoch - j, of_std = shape.stoch + j;
    const Vector<Real> dz = load_or(grad + j, left, Real(0));
    write(j, load_gradient(own, j, left) + dz, left);
    Vector<Real> result = load_gradient(own, of_std, left);
    if (!noise.none()) {
      const Vector<Real> s = sigmoid(load_or(stats + of_std, left, Real(0)) * Real(0.5));
      result += dz * noise.template at<Noise::normal>(j, left) * s * (Real(1) - s);
    }
    write(of_std, result, left);
  }
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
