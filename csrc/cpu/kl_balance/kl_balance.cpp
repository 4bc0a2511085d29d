// The balanced KL loss of categorical and Gaussian latents. For a step, with p the side called lhs and q the other:
//
//     KL = Σ_s Σ_c p·(log p - log q)                                   categorical: log p, log q by log-softmax
//     KL = Σ_s ½(ρ² + δ² - 1) - log ρ,  ρ = σp/σq, δ = (μp - μq)/σq     Gaussian
//
// Both halves of the loss have that value and differ in where their gradient goes: L = max(mean KL, free), or with
// per_step mean max(KL, free). Backward, for the cotangent g and N steps, a = g/N, or 0 where the limit is reached:
//
//     dlogit_p = a·wp·p·(log p - log q - KL_s)   dlogit_q = a·wq·(q - p)
//     dμp = a·wp·δ/σq   dσp = a·wp·(ρ/σq - 1/σp)   dμq = -a·wq·δ/σq   dσq = a·wq·(1 - ρ² - δ²)/σq
//
// Forward leaves nothing but KL of every step: log-softmax is computed again, a variable at a time in the first-level
// cache. The steps are added up in one order.

#include "kl_balance.h"

#include "../parts/latent.h"
#include "../parts/team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

template <class T>
struct Kl {
  using Real = Wide<T>;
  using Vec = Vector<Real>;
  static constexpr int kLanes = kWidth<Real>;
  const KlProblem& p;

  static const T* row(const void* tensor, int64_t at) { return static_cast<const T*>(tensor) + at; }
  static T* row(void* tensor, int64_t at) { return static_cast<T*>(tensor) + at; }

  // log-softmax of one variable.
  void log_softmax(const T* logit, Real* out) const {
    const Real lowest = -Real(__builtin_inf());
    Vec top = splat(lowest);
    for (int64_t c = 0; c < p.classes; c += kLanes) top = max(load_or(logit + c, p.classes - c, lowest), top);
    const Real offset = largest<Real>(top);
    Total<Vec> powers;
    for (int64_t c = 0; c < p.classes; c += kLanes) {
      const Vec x = load_or(logit + c, p.classes - c, lowest) - offset;
      powers.add(exp(x));
      store_left(out + c, x, p.classes - c);
    }
    const Real log_sum = log(splat(powers.value()))[0];
    for (int64_t c = 0; c < p.classes; c += kLanes) {
      store_left(out + c, load_or(out + c, p.classes - c, Real(0)) - log_sum, p.classes - c);
    }
  }

  // KL of the variable whose logits begin at `at`; leaves both log-softmaxes.
  Real of_variable(int64_t at, Real* log_p, Real* log_q) const {
    log_softmax(row(p.p[0], at), log_p);
    log_softmax(row(p.q[0], at), log_q);
    Total<Vec> total;
    for (int64_t c = 0; c < p.classes; c += kLanes) {
      const Vec lp = load_or(log_p + c, p.classes - c, Real(0));
      total.add(exp(lp) * (lp - load_or(log_q + c, p.classes - c, Real(0))));  // beyond: 0
    }
    return total.value();
  }

  Real categorical(int64_t step, Real* scratch) const {
    Real total = 0;
    for (int64_t s = 0; s < p.stoch; ++s) {
      total += of_variable((step * p.stoch + s) * p.classes, scratch, scratch + p.classes);
    }
    return total;
  }

  void categorical_gradient(int64_t step, Real a, Real* log_p) const {
    Real* log_q = log_p + p.classes;
    for (int64_t s = 0; s < p.stoch; ++s) {
      const int64_t at = (step * p.stoch + s) * p.classes;
      const Real divergence = of_variable(at, log_p, log_q);
      for (int64_t c = 0; c < p.classes; c += kLanes) {
        const int64_t left = p.classes - c;
        const Vec lp = load_or(log_p + c, left, Real(0)), lq = load_or(log_q + c, left, Real(0));
        const Vec prob = exp(lp);
        store_left(row(p.grad_p[0], at + c), a * Real(p.weight_p) * (prob * (lp - lq - divergence)), left);
        store_left(row(p.grad_q[0], at + c), a * Real(p.weight_q) * (exp(lq) - prob), left);
      }
    }
  }

  struct Ratios {
    Vec rho, delta, sigma_p, sigma_q;
  };

  // Beyond `left`: two equal normals.
  Ratios ratios(int64_t at, int64_t left) const {
    const Vec sigma_p = load_or(row(p.p[1], at), left, Real(1));
    const Vec sigma_q = load_or(row(p.q[1], at), left, Real(1));
    const Vec mean_p = load_or(row(p.p[0], at), left, Real(0));
    const Vec mean_q = load_or(row(p.q[0], at), left, Real(0));
    return {sigma_p / sigma_q, (mean_p - mean_q) / sigma_q, sigma_p, sigma_q};
  }

  Real normal(int64_t step) const {
    Total<Vec> total;
    for (int64_t s = 0; s < p.stoch; s += kLanes) {
      const Ratios r = ratios(step * p.stoch + s, p.stoch - s);
      total.add(Real(0.5) * (r.rho * r.rho + r.delta * r.delta - Real(1)) - log(r.rho));
    }
    return total.value();
  }

  void normal_gradient(int64_t step, Real a) const {
    const Real of_p = a * Real(p.weight_p), of_q = a * Real(p.weight_q);
    for (int64_t s = 0; s < p.stoch; s += kLanes) {
      const int64_t at = step * p.stoch + s, left = p.stoch - s;
      const Ratios r = ratios(at, left);
      const Vec of_mean = r.delta / r.sigma_q;
      store_left(row(p.grad_p[0], at), of_p * of_mean, left);
      store_left(row(p.grad_p[1], at), of_p * (r.rho / r.sigma_q - Real(1) / r.sigma_p), left);
      store_left(row(p.grad_q[0], at), -of_q * of_mean, left);
      store_left(row(p.grad_q[1], at), of_q * ((Real(1) - r.rho * r.rho - r.delta * r.delta) / r.sigma_q), left);
    }
  }

  // What a nat of the step adds to the loss, times the cotangent.
  Real coefficient(int64_t step) const {
    const Real reached = p.per_step ? static_cast<Real*>(p.value)[step] : *static_cast<Real*>(p.mean);
    return reached >= Real(p.free) ? *static_cast<const Real*>(p.grad) / Real(p.steps) : Real(0);
  }

  // The mean of the steps and the loss. NaN stays, as with PyTorch's clamp.
  void finish() const {
    const Real* value = static_cast<const Real*>(p.value);
    const Real free = Real(p.free);
    double total = 0, limited = 0;
    for (int64_t step = 0; step < p.steps; ++step) {
      total += double(value[step]);
      limited += double(value[step] < free ? free : value[step]);
    }
    const Real mean = Real(total / double(p.steps));
    *static_cast<Real*>(p.mean) = mean;
    *static_cast<Real*>(p.loss) = p.per_step ? Real(limited / double(p.steps)) : mean < free ? free : mean;
  }
};

template <class T>
void kl(const KlProblem& p) {
  using Real = Wide<T>;
  const Kl<T> op{p};
  run_team(p.threads, [&](const Team& team) {
    Real* scratch = static_cast<Real*>(p.scratch) + team.rank * 2 * p.classes;
    const Range steps = share(p.steps, team);
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      if (p.grad == nullptr) {
        static_cast<Real*>(p.value)[step] = p.classes ? op.categorical(step, scratch) : op.normal(step);
      } else if (p.classes) {
        op.categorical_gradient(step, op.coefficient(step), scratch);
      } else {
        op.normal_gradient(step, op.coefficient(step));
      }
    }
    team.barrier();
    if (team.rank == 0 && p.grad == nullptr) op.finish();
  });
}

}  // namespace

const ByDtype<Function<KlProblem>> kl_balance = {kl<float>, kl<double>, kl<Bf16>};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
