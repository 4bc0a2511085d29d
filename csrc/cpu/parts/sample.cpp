// Samples of all latents at once and their gradient, see latent.h; and Gumbel noise by itself.

#include "sample.h"

#include "latent.h"
#include "team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

template <class Real>
void sample_row(const SampleProblem& p, int64_t r) {
  const LatentShape shape{p.stoch, p.discrete, p.min_std};
  const int64_t latents = p.stoch * (p.discrete ? p.discrete : 1), width = p.discrete ? latents : 2 * p.stoch;
  const Real* stats = static_cast<const Real*>(p.stats) + r * width;
  const Real* values = p.noise ? static_cast<const Real*>(p.noise) + r * latents : nullptr;
  const LatentNoise<Real> noise{values, p.seed, r * latents};
  if (p.grad == nullptr) {
    sample_latents(shape, stats, noise, static_cast<Real*>(p.out) + r * latents, nullptr);
    return;
  }
  Real* out = static_cast<Real*>(p.out) + r * width;
  const Real* none = nullptr;
  latents_backward(shape, stats, static_cast<const Real*>(p.grad) + r * latents, noise, none,
                   [&](int64_t j, Vector<Real> x, int64_t left) { store_left(out + j, x, left); });
}

template <class Real>
void sample_rows(const SampleProblem& p) {
  run_team(p.threads, [&](const Team& team) {
    const Range rows = share(p.rows, team);
    for (int64_t r = rows.begin; r < rows.end; ++r) sample_row<Real>(p, r);
  });
}

template <class Real>
void gumbel_noise(const GumbelProblem& p) {
  run_team(p.threads, [&](const Team& team) {
    const Range part = share(p.count, team);
    Real* out = static_cast<Real*>(p.out) + part.begin;
    make_noise<Noise::gumbel>(uint64_t(*p.seed), uint32_t(part.begin), part.end - part.begin, out);
  });
}

}  // namespace

const ByDtype<Function<SampleProblem>> sample = {sample_rows<float>, sample_rows<double>, nullptr};
const ByDtype<Function<GumbelProblem>> draw_gumbel = {gumbel_noise<float>, gumbel_noise<double>, nullptr};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
