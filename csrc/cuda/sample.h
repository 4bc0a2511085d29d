// The prior's samples, of all steps at once, and their way back: the same choice and the same noise as in the scan.
#pragma once

#include "philox.h"
#include "scan.h"

extern "C" {

struct ApvSample {
  int64_t rows, stoch, discrete;  // rows: B·T; discrete = 0: Gaussian
  double min_std;
  const float* stats;   // [rows, M]
  const float* noise;   // [rows, L], or null
  const int64_t* seed;  // or null; both null: modes
  float* sample;        // [rows, L]
  const float* grad;    // [rows, L]
  float* dstats;        // [rows, M]
};

}  // extern "C"

namespace apv_fast::cuda {

template <int THREADS>
struct Sampler {
  static constexpr int kThreads = THREADS;

  const ApvSample& s;

  // Categorical: a warp a latent. Gaussian: a thread a latent.
  static int64_t blocks(const ApvSample& s) {
    const int64_t threads = s.rows * s.stoch * (s.discrete ? 32 : 1);
    return (threads + THREADS - 1) / THREADS;
  }

  APV_DEVICE float noise_at(int64_t index) const {
    if (s.noise) return s.noise[index];
    if (!s.seed) return 0;
    const uint64_t seed = static_cast<uint64_t>(*s.seed);
    return s.discrete ? gumbel(seed, static_cast<uint32_t>(index)) : normal(seed, static_cast<uint32_t>(index));
  }
  APV_DEVICE int64_t global_thread() const { return int64_t{block()} * THREADS + thread(); }

  APV_DEVICE void forward() const {
    if (!s.discrete) return gaussian();
    const int64_t latent = global_thread() / 32, first = latent * s.discrete;
    if (latent >= s.rows * s.stoch) return;
    float top = -INFINITY;
    int best = static_cast<int>(s.discrete);  // above every class, so that the first of equals wins
    for (int c = lane(); c < s.discrete; c += 32) {
      const float score = s.stats[first + c] + noise_at(first + c);
      if (best == s.discrete || score > top) top = score, best = c;
    }
    APV_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      const float score = shuffle_xor(top, mask);
      const int c = static_cast<int>(float_to_bits(shuffle_xor(bits_to_float(best), mask)));
      if (score > top || (score == top && c < best)) top = score, best = c;
    }
    for (int c = lane(); c < s.discrete; c += 32) s.sample[first + c] = c == best ? 1.0f : 0.0f;
  }

  APV_DEVICE void gaussian() const {
    const int64_t latent = global_thread(), row = latent / s.stoch, mean = latent + row * s.stoch;
    if (row >= s.rows) return;
    const bool sampled = s.noise || s.seed;
    const float spread = sampled ? deviation(s.stats[mean + s.stoch], static_cast<float>(s.min_std)) : 0;
    s.sample[latent] = s.stats[mean] + (sampled ? spread * noise_at(latent) : 0);
  }

  APV_DEVICE void backward() const {
    if (!s.discrete) return gaussian_backward();
    const int64_t latent = global_thread() / 32, first = latent * s.discrete;
    if (latent >= s.rows * s.stoch) return;
    float top = -INFINITY, sum = 0, dot = 0;
    for (int c = lane(); c < s.discrete; c += 32) top = fmaxf(top, s.stats[first + c]);
    APV_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
    for (int c = lane(); c < s.discrete; c += 32) {
      const float weight = expf(s.stats[first + c] - top);
      sum += weight;
      dot += weight * s.grad[first + c];
    }
    APV_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
      dot += shuffle_xor(dot, mask);
    }
    for (int c = lane(); c < s.discrete; c += 32) {
      s.dstats[first + c] = expf(s.stats[first + c] - top) / sum * (s.grad[first + c] - dot / sum);
    }
  }

  APV_DEVICE void gaussian_backward() const {
    const int64_t latent = global_thread(), row = latent / s.stoch, mean = latent + row * s.stoch;
    if (row >= s.rows) return;
    s.dstats[mean] = s.grad[latent];
    s.dstats[mean + s.stoch] = s.grad[latent] * noise_at(latent) * deviation_grad(s.stats[mean + s.stoch]);
  }
};

}  // namespace apv_fast::cuda
