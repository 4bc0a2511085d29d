// Samples of all latents at once and their gradient, see latent.h.

#include "latent.h"
#include "pointwise.h"
#include "team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

template <class Real>
void sample_rows(const SampleProblem& p) {
  const LatentShape shape{p.stoch, p.discrete, p.min_std};
  const int64_t mixed = p.stoch * (p.discrete ? p.discrete : 1), width = p.discrete ? mixed : 2 * p.stoch;
  run_team(p.threads, [&](const Team& team) {
    const Range rows = share(p.rows, team);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Real* stats = static_cast<const Real*>(p.stats) + r * width;
      const Real* given = p.noise ? static_cast<const Real*>(p.noise) + r * mixed : nullptr;
      const LatentNoise<Real> noise{given, p.seed, r * mixed};
      if (p.grad == nullptr) {
        sample_latents(shape, stats, noise, static_cast<Real*>(p.out) + r * mixed, nullptr);
        continue;
      }
      Real* out = static_cast<Real*>(p.out) + r * width;
      const Real* none = nullptr;
      latents_backward(shape, stats, static_cast<const Real*>(p.grad) + r * mixed, noise, none,
                       [&](int64_t j, Vector<Real> x, int64_t left) { store_left(out + j, x, left); });
    }
  });
}

}  // namespace

const ByType<SampleProblem> sample = {sample_rows<float>, sample_rows<double>, nullptr};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
