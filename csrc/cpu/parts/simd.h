// Vectors of the instruction set that a file is compiled for.
//
// For files that are compiled once for every instruction set (`add_isa` in CMakeLists.txt): APV_FAST_ISA names the
// namespace and everything has internal linkage. Of an inline function that several object files define, the linker
// keeps any copy, perhaps one with instructions that the CPU lacks; so no such file uses the standard library's.
#pragma once

#include <cstdint>
#include <type_traits>  // types only: no code

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bf16.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

using Floats __attribute__((vector_size(kVectorBytes))) = float;
using Doubles __attribute__((vector_size(kVectorBytes))) = double;
using Words __attribute__((vector_size(kVectorBytes))) = uint32_t;
using Halves __attribute__((vector_size(kVectorBytes / 2))) = uint16_t;

template <class Real>
using Vector = std::conditional_t<std::is_same_v<Real, double>, Doubles, Floats>;

template <class Real>
constexpr int kWidth = kVectorBytes / sizeof(Real);

// What values of type T are computed in: sums, states, statistics.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A vector with `x` in every lane. Subtracting a positive zero keeps every value, -0 too.
inline Floats splat(float x) { return x - Floats{}; }
inline Doubles splat(double x) { return x - Doubles{}; }

// Memory need not be aligned for any of these.
inline Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline Doubles load(const double* from) {
  Doubles x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const Bf16* from) {
  Halves bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

inline void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }
inline void store(double* to, Doubles x) { __builtin_memcpy(to, &x, sizeof x); }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline void store(Bf16* to, Floats x) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(to, &rounded, sizeof rounded);
#else
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
#endif
}

// The same for the first `count` lanes, of which there may be fewer than a vector has; lanes beyond are 0.
template <class T>
inline Vector<Wide<T>> load(const T* from, int64_t count) {
  T lanes[kWidth<Wide<T>>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

template <class T>
inline void store(T* to, Vector<Wide<T>> x, int64_t count) {
  T lanes[kWidth<Wide<T>>];
  store(lanes, x);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// The sum of all lanes, in a fixed order.
template <class V>
inline auto sum(V x) {
  std::remove_cv_t<std::remove_reference_t<decltype(x[0])>> lanes[sizeof(V) / sizeof(x[0])];
  store(lanes, x);
  for (int half = sizeof(V) / sizeof(x[0]) / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// One number each way, for what is not worth a vector.
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
inline T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return Bf16{uint16_t(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40)};
  } else {
    return x;
  }
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
