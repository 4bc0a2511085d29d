// The λ-return and its gradient, a vector of sequences at a time:
//
//     m_t = (1 - λ)·v_{t+1} + λ·G_{t+1},  G_t = r_t + γ_t·m_t;  v_H = G_H = bootstrap
//     a_t = g_t + λ·γ_{t-1}·a_{t-1};  dr_t = a_t,  dγ_t = a_t·m_t,  dv_{t+1} = (1 - λ)·γ_t·a_t
//     dbootstrap = γ_{H-1}·a_{H-1}
//
// The way back computes the m_t again: returns that were rounded to 16 bits would not do.

#include "lambda_return.h"

#include "../parts/simd.h"
#include "../parts/team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

template <class T>
struct Returns {
  using Real = Wide<T>;
  using Vec = Vector<Real>;
  const ReturnsProblem& p;
  int64_t column, count;  // the sequences at hand

  Vec get(const void* from, int64_t t) const {
    const T* at = static_cast<const T*>(from) + t * p.n + column;
    return count == kWidth<Real> ? load(at) : load(at, count);
  }

  void put(void* to, int64_t t, Vec x) const {
    T* at = static_cast<T*>(to) + t * p.n + column;
    if (count == kWidth<Real>) return store(at, x);
    store(at, x, count);
  }

  // Leaves m_t in blend[t], and G_t in p.out if wanted.
  void walk_back(Vec* blend) const {
    const Real lambda = Real(p.lambda), rest = Real(1 - p.lambda);
    Vec following = get(p.bootstrap, 0), last = following;
    for (int64_t t = p.horizon - 1; t >= 0; --t) {
      blend[t] = rest * following + lambda * last;
      last = get(p.reward, t) + get(p.discount, t) * blend[t];
      following = get(p.value, t);
      if (p.out != nullptr) put(p.out, t, last);
    }
  }

  void gradient(const Vec* blend) const {
    const Real lambda = Real(p.lambda), rest = Real(1 - p.lambda);
    Vec carry = {};
    for (int64_t t = 0; t < p.horizon; ++t) {
      const Vec total = get(p.grad, t) + lambda * carry;
      put(p.grad_reward, t, total);
      put(p.grad_discount, t, total * blend[t]);
      put(p.grad_value, t, rest * carry);
      carry = get(p.discount, t) * total;
    }
    put(p.grad_bootstrap, 0, carry);
  }
};

template <class T>
void returns(const ReturnsProblem& p) {
  constexpr int64_t width = kWidth<Wide<T>>;
  run_team(p.threads, [&](const Team& team) {
    Vector<Wide<T>>* blend = static_cast<Vector<Wide<T>>*>(p.scratch) + team.rank * p.horizon;
    const Range vectors = share((p.n + width - 1) / width, team);
    for (int64_t v = vectors.begin; v < vectors.end; ++v) {
      const int64_t left = p.n - v * width;
      const Returns<T> part{p, v * width, left < width ? left : width};
      part.walk_back(blend);
      if (p.grad != nullptr) part.gradient(blend);
    }
  });
}

}  // namespace

const ByDtype<Function<ReturnsProblem>> lambda_return = {returns<float>, returns<double>, returns<Bf16>};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
