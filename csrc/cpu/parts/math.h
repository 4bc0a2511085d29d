// Elementary functions of vectors: one polynomial for all lanes of floats, libm a lane at a time for doubles.
//
// floats, with ln 2 in two parts (Cody and Waite), the first of so few bits that n times it is exact:
//     exp, expm1    x = n·ln2 + r, |r| <= ln2/2;  e^r - 1 = q = r + r²·P(r);  e^x = 2^n + 2^n·q
//     log           x = 2^n·(1 + f), 1 + f in [√½, √2);  log x = n·ln2 + f - f²/2 + f³·P(f)
//     tanh, sigmoid by e^-2|x| and e^-|x|, which do not overflow
// The P are minimax polynomials for the relative error of the function. The errors that tests/cpu/test_math.py allows:
// 2 ulp, tanh and sigmoid 2.5; infinities, NaN, -0, subnormal arguments and results are right. See simd.h for what such
// a file may use.
#pragma once

#include "simd.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

inline Words bits_of(Floats x) { return (Words)x; }
inline Floats floats_of(Words bits) { return (Floats)bits; }

inline Floats abs(Floats x) { return floats_of(bits_of(x) & 0x7fffffffu); }

// The size of the first, the sign of the second.
inline Floats with_sign(Floats size, Floats sign) {
  return floats_of((bits_of(size) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// The smaller and the larger of two; `x` where one is NaN.
template <class V>
inline V min(V limit, V x) {
  return limit < x ? limit : x;
}

template <class V>
inline V max(V limit, V x) {
  return limit > x ? limit : x;
}

// x = n·ln2 + r: q = e^r - 1, n a whole number, and its bits with 23 - 2^24 below: shifted by 23, an exponent.
struct Reduced {
  Floats n, q;
  Words shifted;
};

// |x| at most 150.
inline Reduced reduce(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5·2^23: adding it rounds to a whole number, in the lowest bits
  const Floats sum = x * 1.44269504f + kMagic;
  const Floats n = sum - kMagic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = splat(0x1.6b9caap-10f);
  p = p * r + 0x1.12256p-7f;
  p = p * r + 0x1.5556f2p-5f;
  p = p * r + 0x1.5554b4p-3f;
  p = p * r + 0x1.fffffep-2f;
  return {n, (r * r) * p + r, bits_of(sum) << 23};
}

inline Floats exp(Floats x) {
  x = max(splat(-104.0f), min(splat(89.0f), x));  // beyond it is 0 or infinite
  const Reduced e = reduce(x);
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_scalef_ps(-1, (__m512)(e.q + 1.0f), (__m512)e.n);  // without a mask GCC 12 warns
#else
  // 2^n in two factors: n reaches from -150, where the result is subnormal, to 128.
  using Ints __attribute__((vector_size(kVectorBytes))) = int32_t;
  const Words half = (Words)(((Ints)e.shifted >> 24) << 23);
  const Floats first = floats_of(half + 0x3f800000u), second = floats_of(e.shifted - half + 0x3f800000u);
  return (e.q + 1.0f) * first * second;
#endif
}

// e^x - 1.
inline Floats expm1(Floats x) {
  const Floats inside = max(splat(-30.0f), min(splat(89.0f), x));
  const Reduced e = reduce(inside);
  const Floats half = floats_of(e.shifted + 0x3f000000u);  // 2^(n - 1): 2^128 would be infinite
  const Floats result = 2.0f * ((half - 0.5f) + half * e.q);
  return abs(x) < 0x1p-25f ? x : result;  // the sign of -0, and all bits of subnormals
}

inline Floats log(Floats x) {
  const Floats scaled = x < 0x1p-126f ? x * 0x1p23f : x;  // no subnormals below
  const Words from_half = bits_of(scaled) - 0x3f3504f3u;  // of √½, so that the exponent changes there
  const Floats mantissa = floats_of((from_half & 0x007fffffu) + 0x3f3504f3u);
  using Ints __attribute__((vector_size(kVectorBytes))) = int32_t;
  Floats n = __builtin_convertvector((Ints)from_half >> 23, Floats);
  n = x < 0x1p-126f ? n - 23.0f : n;
  const Floats f = mantissa - 1.0f;
  Floats p = splat(-0x1.38cf2p-4f);
  p = p * f + 0x1.05602ep-3f;
  p = p * f - 0x1.0d81f2p-3f;
  p = p * f + 0x1.22d8f8p-3f;
  p = p * f - 0x1.54728cp-3f;
  p = p * f + 0x1.99a01ep-3f;
  p = p * f - 0x1.000226p-2f;
  p = p * f + 0x1.555554p-2f;
  const Floats square = f * f;
  Floats tail = n * -2.12194440e-4f + (square * f) * p;
  tail = tail - 0.5f * square;
  const Floats result = n * 0.693359375f + (f + tail);
  const Floats special = x > 0.0f ? x : (x == 0.0f ? splat(-__builtin_inff()) : splat(__builtin_nanf("")));
  return (x > 0.0f) & (x < __builtin_inff()) ? result : (x == x ? special : x);
}

// With E = e^-2|x|: (1 - E)/(1 + E), where it is near 1 as 1 - 2·E/(1 + E), whose quotient's error weighs little.
inline Floats tanh(Floats x) {
  const Floats size = abs(x);
  const Reduced e = reduce(max(splat(-30.0f), -2.0f * size));
  const Floats power = floats_of(e.shifted + 0x3f800000u);
  const Floats whole = power * e.q + power;
  const auto near_0 = size < 0.6f;
  const Floats quotient = (near_0 ? (1.0f - power) - power * e.q : 2.0f * whole) / (1.0f + whole);
  const Floats result = near_0 ? quotient : 1.0f - quotient;
  return size < 0x1p-12f ? x : with_sign(result, x);
}

inline Floats sigmoid(Floats x) {
  const Floats e = exp(-abs(x));
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

inline Floats sqrt(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_sqrt_ps(-1, (__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kWidth<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Doubles. __builtin_exp is a call of libm's exp.
#define APV_FAST_EVERY_LANE(name)                                                  \
  inline Doubles name(Doubles x) {                                                 \
    for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_##name(x[i]);        \
    return x;                                                                      \
  }
APV_FAST_EVERY_LANE(exp)
APV_FAST_EVERY_LANE(expm1)
APV_FAST_EVERY_LANE(log)
APV_FAST_EVERY_LANE(tanh)
APV_FAST_EVERY_LANE(sqrt)
#undef APV_FAST_EVERY_LANE

inline Doubles sigmoid(Doubles x) {
  const Doubles e = exp(x < 0.0 ? x : -x);
  return (x < 0.0 ? e : splat(1.0)) / (1.0 + e);
}

// x where positive, else e^x - 1.
template <class V>
inline V elu(V x) {
  return x > 0 ? x : expm1(x);
}

// ELU's derivative from its output: 1 where positive, else y + 1.
template <class V>
inline V elu_grad(V y) {
  return y > 0 ? V{} + 1 : y + 1;
}

// ELU's derivative from its argument: 1 where positive, else e^x.
template <class V>
inline V elu_grad_of_argument(V x) {
  return x > 0 ? V{} + 1 : exp(x);
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
