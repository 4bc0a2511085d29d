// Actions of an actor, sampled and differentiated, row by row. One-hot ones are a categorical variable (latent.h). From
// the head (o, r) of a continuous one and a uniform u, the normal truncated to [-1, 1], by the inverse of its
// distribution:
//
//     mu = tanh(o),  sigma = 2·sigmoid(r/2) + min_std,  l = (-1 - mu)/sigma,  h = (1 - mu)/sigma
//     xi = Φ⁻¹((1 - u)·Φ(l) + u·Φ(h)),  a = clip(mu + sigma·xi, ±(1 - 1e-6)), the clip with a straight-through gradient
//     da/dmu = 1 - ((1 - u)·φ(l) + u·φ(h))/φ(xi),  da/dsigma = xi - ((1 - u)·φ(l)·l + u·φ(h)·h)/φ(xi)
//
// All of it in doubles, which a few numbers a row can afford: in float Φ rounds to 1 and the tails are lost. xi is
// clamped into [l, h], where it lies but for rounding, so that φ(l)/φ(xi) = exp((xi² - l²)/2) cannot overflow. Φ⁻¹ is
// Wichura's algorithm AS 241 (Applied Statistics 37, 1988), 16 digits. See simd.h on files of this kind.
#pragma once

#include "latent.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

constexpr double kActionClip = 1e-6;  // apv_fast.nn.distributions.CLIP

inline double normal_cdf(double x) { return 0.5 * __builtin_erfc(-x * 0.70710678118654752); }

// The quotient of two polynomials, coefficients from the highest power on.
template <int N>
inline double rational(const double (&above)[N], const double (&below)[N], double x) {
  double a = above[0], b = below[0];
  for (int i = 1; i < N; ++i) {
    a = a * x + above[i];
    b = b * x + below[i];
  }
  return a / b;
}

// Φ⁻¹(p), 0 < p < 1.
inline double normal_quantile(double p) {
  static constexpr double kMiddle[2][8] = {
      {2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
       13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.3871328727963666080},
      {5226.4952788528545610, 28729.085735721942674, 39307.895800092710610, 21213.794301586595867,
       5394.1960214247511077, 687.18700749205790830, 42.313330701600911252, 1.0}};
  static constexpr double kTail[2][8] = {
      {7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258,
       3.64784832476320460504, 5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734},
      {1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
       6.89767334985100004550e-1, 1.67638483018380384940, 2.05319162663775882187, 1.0}};
  static constexpr double kFarTail[2][8] = {
      {2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
       2.96560571828504891230e-1, 1.78482653991729133580, 5.46378491116411436990, 6.65790464350110377720},
      {2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
       1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0}};
  const double q = p - 0.5;
  if (__builtin_fabs(q) <= 0.425) return q * rational(kMiddle[0], kMiddle[1], 0.180625 - q * q);
  const double r = __builtin_sqrt(-__builtin_log(q < 0 ? p : 1 - p));
  const double tail = r <= 5 ? rational(kTail[0], kTail[1], r - 1.6) : rational(kFarTail[0], kFarTail[1], r - 5);
  return q < 0 ? -tail : tail;
}

// One truncated normal, as the head of its comment names its parts.
struct TruncatedNormal {
  double loc, s, scale, low, high, u, normal;

  TruncatedNormal(double out, double raw, double u, double min_std) : u(u) {
    loc = __builtin_tanh(out);
    s = 1 / (1 + __builtin_exp(-raw / 2));
    scale = 2 * s + min_std;
    low = (-1 - loc) / scale;
    high = (1 - loc) / scale;
    double cdf = (1 - u) * normal_cdf(low) + u * normal_cdf(high);
    cdf = cdf < 1e-300 ? 1e-300 : cdf > 1 - 0x1p-53 ? 1 - 0x1p-53 : cdf;
    normal = normal_quantile(cdf);
    normal = normal < low ? low : normal > high ? high : normal;
  }

  double sample() const {
    const double a = loc + scale * normal, limit = 1 - kActionClip;
    return a < -limit ? -limit : a > limit ? limit : a;
  }

  // The gradients of out and raw from that of the sample.
  void backward(double grad, double* of_out, double* of_raw) const {
    const double at_low = (1 - u) * __builtin_exp(0.5 * (normal * normal - low * low));
    const double at_high = u * __builtin_exp(0.5 * (normal * normal - high * high));
    *of_out = grad * (1 - at_low - at_high) * (1 - loc * loc);
    *of_raw = grad * (normal - at_low * low - at_high * high) * s * (1 - s);
  }
};

// What decides an actor's actions; the noise is Gumbel for one-hot ones, else uniform in [0, 1).
struct ActionKind {
  int64_t actions;
  bool one_hot;
  double min_std;

  LatentShape shape() const { return {1, actions, 0}; }
};

// Uniform number `a` of a row.
template <class Real>
inline Real uniform_at(const LatentNoise<Real>& noise, int64_t a) {
  return noise.values ? noise.values[a] : Real(uniform(uint64_t(*noise.seed), uint32_t(noise.first + a))[0]);
}

// Action [A] of a head, [A] or [2A]; the mode without noise.
template <class Real>
inline void sample_action(const ActionKind& kind, const Real* head, const LatentNoise<Real>& noise, Real* action) {
  if (kind.one_hot) return sample_latents(kind.shape(), head, noise, action, static_cast<int32_t*>(nullptr));
  for (int64_t a = 0; a < kind.actions; ++a) {
    if (noise.none()) {
      action[a] = Real(__builtin_tanh(double(head[a])));
    } else {
      action[a] = Real(TruncatedNormal(head[a], head[kind.actions + a], uniform_at(noise, a), kind.min_std).sample());
    }
  }
}

// The head's gradient from the action's: calls write(j, x) for each number.
template <class Real, class Write>
inline void sample_action_backward(const ActionKind& kind, const Real* grad, const Real* head,
                                   const LatentNoise<Real>& noise, const Write& write) {
  const int64_t n = kind.actions;
  if (kind.one_hot) {
    const Real* const none = nullptr;
    return latents_backward(kind.shape(), head, grad, noise, none, [&](int64_t j, Vector<Real> x, int64_t left) {
      for (int64_t i = 0; i < kWidth<Real> && i < left; ++i) write(j + i, x[i]);
    });
  }
  for (int64_t a = 0; a < n; ++a) {
    double of_out, of_raw;
    TruncatedNormal(head[a], head[n + a], uniform_at(noise, a), kind.min_std).backward(grad[a], &of_out, &of_raw);
    write(a, Real(of_out));
    write(n + a, Real(of_raw));
  }
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
