// With the gradients g of all weights w, the moments m and v, and the corrected rate η:
//
//     norm = √Σ g²      g ← g·min(1, clip/norm)      w ← (1 - decay)·w
//     m ← m + (1 - β₁)(g - m)      v ← β₂·v + (1 - β₂)·g²      w ← w - η·m/(√v + ε)
//
// Gradients are read and not written. A block's squares are added up in vectors, the blocks in one order.

#include "keras_adam.h"

#include "../parts/math.h"
#include "../parts/team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

template <class Real>
double squares(const AdamProblem& p, const AdamBlock& block) {
  constexpr int width = kWidth<Real>;
  const Real* g = static_cast<const Real*>(p.weights[block.weight].gradient);
  if (g == nullptr) return 0;
  double total = 0;
  for (int64_t begin = block.begin; begin < block.end; begin += 128 * width) {  // so that sums stay exact enough
    const int64_t end = begin + 128 * width < block.end ? begin + 128 * width : block.end;
    Vector<Real> sums[4] = {};
    int64_t i = begin;
    for (; i + 4 * width <= end; i += 4 * width) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Vector<Real> x = load(g + i + k * width);
        sums[k] += x * x;
      }
    }
    for (; i < end; i += width) {
      const Vector<Real> x = i + width <= end ? load(g + i) : load(g + i, end - i);
      sums[0] += x * x;
    }
    total += double(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

template <class Real>
struct Step {
  Real kept, factor, size, eps, towards_g, beta2, towards_square;

  Vector<Real> operator()(Vector<Real> w, Vector<Real> g, Vector<Real>& m, Vector<Real>& v) const {
    g *= factor;
    m += towards_g * (g - m);
    v = v * beta2 + towards_square * (g * g);
    return w * kept - size * m / (sqrt(v) + eps);
  }
};

template <class Real>
void move(const AdamProblem& p, const AdamBlock& block, const Step<Real>& step) {
  constexpr int width = kWidth<Real>;
  const AdamWeight& of = p.weights[block.weight];
  Real *w = static_cast<Real*>(of.weight), *m = static_cast<Real*>(of.first), *v = static_cast<Real*>(of.second);
  const Real* g = static_cast<const Real*>(of.gradient);
  int64_t i = block.begin;
  if (g == nullptr) {
    for (; i < block.end; ++i) w[i] *= step.kept;
    return;
  }
  for (; i + width <= block.end; i += width) {
    Vector<Real> first = load(m + i), second = load(v + i);
    store(w + i, step(load(w + i), load(g + i), first, second));
    store(m + i, first);
    store(v + i, second);
  }
  const int64_t left = block.end - i;
  if (left == 0) return;
  Vector<Real> first = load(m + i, left), second = load(v + i, left);
  store(w + i, step(load(w + i, left), load(g + i, left), first, second), left);
  store(m + i, first, left);
  store(v + i, second, left);
}

template <class Real>
void adam(const AdamProblem& p) {
  run_team(p.threads, [&](const Team& team) {
    const Range mine = share(p.count, team);
    for (int64_t b = mine.begin; b < mine.end; ++b) p.partial[b] = squares<Real>(p, p.blocks[b]);
    team.barrier();
    double total = 0;
    for (int64_t b = 0; b < p.count; ++b) total += p.partial[b];
    const double norm = __builtin_sqrt(total);
    if (team.rank == 0) *p.norm = norm;
    const double factor = norm > p.clip ? p.clip / norm : norm == norm ? 1 : norm;
    const Step<Real> step{Real(1 - p.decay),  Real(factor), Real(p.size),      Real(p.eps),
                          Real(1 - p.beta1), Real(p.beta2), Real(1 - p.beta2)};
    for (int64_t b = mine.begin; b < mine.end; ++b) move(p, p.blocks[b], step);
  });
}

}  // namespace

const ByDtype<Function<AdamProblem>> keras_adam = {adam<float>, adam<double>, nullptr};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
