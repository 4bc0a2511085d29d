// Counter-based noise (Salmon et al. 2011), a vector at a time: Philox-4x32-10, key = seed, counter = (index, 0, 0, 0).
// The twin of apv_fast/reference/noise.py: uniforms have the same bits. See simd.h for what such a file may use.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "math.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// Each lane's upper half is whatever arithmetic left there: nothing reads it.
using Longs __attribute__((vector_size(kVectorBytes))) = uint64_t;

// The product of the lower halves, 64 bits.
inline Longs product(Longs a, uint32_t b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_maskz_mul_epu32(-1, (__m512i)a, (__m512i)(Longs{} + b));
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)(Longs{} + b));
#elif defined(__SSE2__)
  return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)(Longs{} + b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

struct Counter {
  Longs c0, c1, c2, c3;
};

// Ten rounds. The first starts from (index, 0, 0, 0).
inline Counter philox(uint64_t seed, Longs index) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  Counter c = {index, Longs{}, Longs{}, Longs{}};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Longs first = product(c.c0, 0xD2511F53u), second = product(c.c2, 0xCD9E8D57u);
    c = {(second >> 32) ^ c.c1 ^ key0, second, (first >> 32) ^ c.c3 ^ key1, first};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// The lower halves of the even lanes' and of the odd lanes' numbers, in turns.
inline Words interleave(Longs even, Longs odd) { return (Words)((even & 0xffffffffu) | (odd << 32)); }

struct NoiseWords {
  Words first, second;
};

// Philox's first two words of the elements index, index + 1, ...
inline NoiseWords noise_words(uint64_t seed, uint32_t index) {
  Longs even = Longs{} + index;
  for (int i = 0; i < kWidth<double>; ++i) even[i] += 2 * i;
  const Counter a = philox(seed, even), b = philox(seed, even + 1);
  return {interleave(a.c0, b.c0), interleave(a.c1, b.c1)};
}

// In (0, 1) with 23 bits: neither end is reached, and both roundings are exact.
inline Floats open_unit(Words word) {
  using Ints __attribute__((vector_size(kVectorBytes))) = int32_t;
  return (__builtin_convertvector((Ints)(word >> 9), Floats) + 0.5f) * (1.0f / 8388608.0f);
}

// cos x for 0 <= x <= 2π: x = k·π/2 + r, the cosine or the sine of r by a minimax polynomial; 2 ulp of 1.
inline Floats cos_of_turn(Floats x) {
  constexpr float kMagic = 12582912.0f;
  const Floats sum = x * 0.636619772f + kMagic;
  const Words k = bits_of(sum);  // its lowest bits
  const Floats n = sum - kMagic;
  const Floats r = ((x - n * 1.5703125f) - n * 4.83751297e-4f) - n * 7.54978995e-8f;
  const Floats z = r * r;
  const Floats c = ((0x1.99e904p-16f * z - 0x1.6c0c2ap-10f) * z + 0x1.55554ap-5f) * (z * z) + (1.0f - 0.5f * z);
  const Floats s = ((-0x1.9953p-13f * z + 0x1.110776p-7f) * z - 0x1.555546p-3f) * (z * r) + r;
  const Floats size = (k & 1) == 0 ? c : s;
  return floats_of(bits_of(size) ^ (((k + 1) & 2) << 30));
}

inline Floats uniform(uint64_t seed, uint32_t index) { return open_unit(noise_words(seed, index).first); }

inline Floats gumbel(uint64_t seed, uint32_t index) { return -log(-log(uniform(seed, index))); }

// Box and Muller.
inline Floats normal(uint64_t seed, uint32_t index) {
  const NoiseWords words = noise_words(seed, index);
  return sqrt(-2.0f * log(open_unit(words.first))) * cos_of_turn(6.28318531f * open_unit(words.second));
}

enum class Noise { uniform, gumbel, normal };

template <Noise kind>
inline Floats noise(uint64_t seed, uint32_t index) {
  if constexpr (kind == Noise::uniform) return uniform(seed, index);
  if constexpr (kind == Noise::gumbel) return gumbel(seed, index);
  return normal(seed, index);
}

// Noise of the elements index, index + 1, ... Which of them one call makes does not matter to their values.
template <Noise kind, class Real>
inline Vector<Real> noise_vector(uint64_t seed, uint32_t index) {
  if constexpr (std::is_same_v<Real, float>) {
    return noise<kind>(seed, index);
  } else {
    float lanes[kWidth<float>];
    store(lanes, noise<kind>(seed, index));
    Vector<Real> x;
    for (int i = 0; i < kWidth<Real>; ++i) x[i] = lanes[i];
    return x;
  }
}

// Noise of the elements index ... index + n - 1. Two vectors at a time: Philox is a chain of dependent steps.
template <Noise kind, class Real>
inline void make_noise(uint64_t seed, uint32_t index, int64_t n, Real* out) {
  constexpr int width = kWidth<Real>;
  const auto at = [&](int64_t i) { return noise_vector<kind, Real>(seed, index + uint32_t(i)); };
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    const Vector<Real> first = at(i), second = at(i + width);
    store(out + i, first);
    store(out + i + width, second);
  }
  for (; i + width <= n; i += width) store(out + i, at(i));
  if (i < n) store(out + i, at(i), n - i);
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
