// The functions of math.h and noise.h, each over an array: what tests/cpu/test_math.py calls.

#include "functions.h"

#include "latent.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

template <class Real>
struct Named {
  const char* name;
  Vector<Real> (*function)(Vector<Real>);
};

template <class Real>
void apply(const FunctionProblem& p) {
  using Vec = Vector<Real>;
  static const Named<Real> functions[] = {
      {"exp", [](Vec x) { return exp(x); }},
      {"expm1", [](Vec x) { return expm1(x); }},
      {"log", [](Vec x) { return log(x); }},
      {"tanh", [](Vec x) { return tanh(x); }},
      {"sigmoid", [](Vec x) { return sigmoid(x); }},
      {"sqrt", [](Vec x) { return sqrt(x); }},
      {"elu", [](Vec x) { return elu(x); }},
      {"elu_grad", [](Vec x) { return elu_grad(x); }},
      {"elu_grad_of_argument", [](Vec x) { return elu_grad_of_argument(x); }},
  };
  Real* out = static_cast<Real*>(p.out);
  for (const Named<Real>& named : functions) {
    if (__builtin_strcmp(named.name, p.name) != 0) continue;
    const Real* from = static_cast<const Real*>(p.from);
    for (int64_t i = 0; i < p.count; i += kWidth<Real>) {
      store_left(out + i, named.function(load_or(from + i, p.count - i, 0)), p.count - i);
    }
  }
  const uint64_t seed = *static_cast<const uint64_t*>(p.from);
  if (__builtin_strcmp(p.name, "uniform_noise") == 0) make_noise<Noise::uniform>(seed, 0, p.count, out);
  if (__builtin_strcmp(p.name, "gumbel_noise") == 0) make_noise<Noise::gumbel>(seed, 0, p.count, out);
  if (__builtin_strcmp(p.name, "normal_noise") == 0) make_noise<Noise::normal>(seed, 0, p.count, out);
}

}  // namespace

const ByDtype<Function<FunctionProblem>> apply_function = {apply<float>, apply<double>, nullptr};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
