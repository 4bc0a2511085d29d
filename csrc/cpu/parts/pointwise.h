// Ops that read and write each number once: samples of latents, the KL loss, images, λ-returns. Tensors are contiguous;
// "wide" is float, or double where the tensor's dtype is. Results do not depend on `threads`.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apv_fast {

// One function a dtype of the tensors.
template <class Problem>
struct ByType {
  void (*float32)(const Problem&);
  void (*float64)(const Problem&);
  void (*bfloat16)(const Problem&);
};

// ---- sample.cpp: see latent.h. Float32 or float64 (bfloat16 is null).

struct SampleProblem {
  int64_t rows, stoch, discrete;  // discrete = 0: Gaussian
  double min_std;
  int threads;
  const void *stats, *noise;  // [rows, M], [rows, L] or null
  const int64_t* seed;        // instead of noise, or null; both null: modes
  const void* grad;           // [rows, L]: of the samples, for the way back; null forward
  void* out;                  // [rows, L], or [rows, M] on the way back
};

struct GumbelProblem {
  int64_t count;
  int threads;
  const int64_t* seed;
  void* out;  // [count]
};

// ---- kl_balance

struct KlProblem {
  int64_t steps, stoch, classes;  // classes = 0: Gaussian
  double weight_p, weight_q;      // of the halves that train p and q
  double free;
  bool per_step;  // compare with `free` every step, not their mean
  int threads;
  const void *p[2], *q[2];      // [steps, S, C] each, or means and deviations [steps, S]
  void *value, *mean, *loss;    // wide: [steps], [], []; forward leaves them, backward reads `value` and `mean`
  const void* grad;             // wide: []: the loss's cotangent, for the way back; null forward
  void *grad_p[2], *grad_q[2];  // like p and q
  void* scratch;                // wide: [threads, 2·classes]
};

// ---- image_loss

struct ImageProblem {
  int64_t count, images;  // numbers in all, and images
  double scale;           // of the gradient: the cotangent / images
  double constant;        // that the loss has beside the squares
  int threads;
  const uint8_t* image;  // [count]
  const void* mean;      // [count]
  double* partial;       // [(count + kImageBlock - 1) / kImageBlock]
  void* loss;            // wide: []; null: not wanted
  void* out;             // [count]: the mean's gradient, or the normalised image; null: not wanted
};

constexpr int64_t kImageBlock = 8192;

// ---- lambda_return

struct ReturnsProblem {
  int64_t horizon, n;
  double lambda;
  int threads;
  const void *reward, *value, *discount, *bootstrap;  // [H, N] three times, [N]
  void* out;                                          // [H, N]: forward
  const void* grad;                                   // [H, N]: of the returns, for the way back; null forward
  void *grad_reward, *grad_value, *grad_discount, *grad_bootstrap;
  void* scratch;  // [threads, H + 1, 64 bytes]
};

// ---- functions.cpp: the vector functions of math.h and noise.h one by one, for tests

struct FunctionProblem {
  int64_t count;
  const char* name;
  const void* from;  // of noise: the address of the seed
  void* out;
};

APV_FAST_FOR_EACH_ISA(extern const ByType<SampleProblem> sample; extern const ByType<GumbelProblem> draw_gumbel;
                      extern const ByType<KlProblem> kl_loss;
                      extern const ByType<ImageProblem> image_loss; extern const ByType<ImageProblem> normalize_image;
                      extern const ByType<ReturnsProblem> lambda_return;
                      extern const ByType<FunctionProblem> apply_function;)

}  // namespace apv_fast
