// Products of a few rows with a weight as PyTorch has it, [units, inputs] in rows:
//
//     out[m, n] = sum over k of a[m, k]·w[n, k]
//
// Nothing is packed: for a few rows the time is that of reading the weight once, in order. Every sum runs over k in
// vectors and then over the lanes, in one order, whatever the number of rows or threads. See simd.h on files of this
// kind.
#pragma once

#include "../parts/product.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// Numbers of k that one step takes.
template <class T>
constexpr int64_t kDepth = kWidth<Wide<T>> * kPair<T>;

// How far ahead a weight is fetched.
constexpr int64_t kFetchBytes = 1024;

// A vector of left operands, and as many right ones of a weight's row.
template <class T>
inline auto left_operands(const Element<T>* a) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) {
    return (__m512bh)_mm512_loadu_si512(a);
  } else {
    return load(a);
  }
#else
  return load(a);
#endif
}

template <class T>
inline auto right_operands(const T* w) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) {
    return (__m512bh)_mm512_loadu_si512(w);
  } else {
    return load(w);
  }
#else
  return load(w);
#endif
}

// The same of a row's last `left`, fewer than a vector has. By way of memory they would be waited for.
template <class T>
inline auto last_operands(const T* w, int64_t left) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << left) - 1), w);
#endif
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), w);
#endif
  if constexpr (!std::is_same_v<T, Bf16> || !std::is_same_v<Element<T>, Bf16>) return load(w, left);
}

// a·b + c, rounded once. Written as a product and a sum, GCC fused them or not depending on how many columns were taken at
// once, and so on the number of threads.
template <class V>
inline V fused(V a, V b, V c) {
  constexpr bool floats = sizeof(a[0]) == 4;
#if defined(__AVX512F__)
  if constexpr (floats) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (floats) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  static_cast<void>(floats);
  return a * b + c;
#endif
}

template <class T, class Left, class Right>
inline Vector<Wide<T>> dot_add(Left a, Right w, Vector<Wide<T>> sum) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, a, w);
  } else {
    return fused(a, w, sum);
  }
#else
  return fused(a, w, sum);
#endif
}

// Groups of `size` lanes of two vectors, each folded to half of its lanes: a's groups, then b's.
template <int size, class V>
inline V fold_groups(V a, V b) {
  constexpr int width = sizeof(V) / sizeof(a[0]), half = size / 2;
#if defined(__clang__)
  V low, high;
  for (int i = 0; i < width; ++i) {
    const int from = i / half * size + i % half;
    low[i] = from < width ? a[from] : b[from - width];
    high[i] = from < width ? a[from + half] : b[from + half - width];
  }
  return low + high;
#else
  std::conditional_t<sizeof(a[0]) == 8, __attribute__((vector_size(kVectorBytes))) int64_t, Words> low, high;
  for (int i = 0; i < width; ++i) {
    low[i] = i / half * size + i % half;
    high[i] = low[i] + half;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// out[j] = sum(x[j]) of simd.h, in the same order: a tree for all of them at once.
template <int count, class Real, class V>
inline void sum_each(const V* x, Real* out) {
  constexpr int width = kWidth<Real>;
  if constexpr (count == 4 && width >= 4) {
    V folded = fold_groups<width / 2>(fold_groups<width>(x[0], x[1]), fold_groups<width>(x[2], x[3]));
    if constexpr (width >= 16) folded = fold_groups<width / 4>(folded, folded);
    if constexpr (width >= 8) folded = fold_groups<width / (width >= 16 ? 8 : 4)>(folded, folded);
    for (int j = 0; j < 4; ++j) out[j] = folded[j];
  } else {
    for (int j = 0; j < count; ++j) out[j] = sum(x[j]);
  }
}

// `Rows` rows of a times `Columns` rows of w; out[i·Columns + j].
template <class T, int Rows, int Columns>
inline void dots(const Element<T>* const* a, const T* w, int64_t stride, int64_t depth, Wide<T>* out) {
  Vector<Wide<T>> sums[Rows][Columns] = {};
  constexpr int64_t fetch = kFetchBytes / sizeof(T);
  const int64_t whole = depth / kDepth<T> * kDepth<T>;
  const auto add = [&](int64_t k, int j, auto right) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) sums[i][j] = dot_add<T>(left_operands<T>(a[i] + k), right, sums[i][j]);
  };
  for (int64_t k = 0; k < whole; k += kDepth<T>) {
    // Past the end of a row, the beginning of the row that comes `Columns` later.
    const int64_t ahead = k + fetch < depth ? k + fetch : k + fetch - depth + Columns * stride;
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) __builtin_prefetch(w + j * stride + ahead, 0, 2);
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) add(k, j, right_operands<T>(w + j * stride + k));
  }
  if (whole < depth) {
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) add(whole, j, last_operands<T>(w + j * stride + whole, depth - whole));
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) sum_each<Columns>(sums[i], out + i * Columns);
}

constexpr int kFew = 4;  // rows at a time

template <class T, int Columns>
inline void dots_of(int64_t rows, const Element<T>* const* a, const T* w, int64_t stride, int64_t depth, Wide<T>* out) {
  switch (rows) {
    case 1: return dots<T, 1, Columns>(a, w, stride, depth, out);
    case 2: return dots<T, 2, Columns>(a, w, stride, depth, out);
    case 3: return dots<T, 3, Columns>(a, w, stride, depth, out);
    default: return dots<T, 4, Columns>(a, w, stride, depth, out);
  }
}

// out[m, n] for the units [begin, end) and every row of a, whose rows are readable for a vector beyond `depth` and zero
// there.
template <class T>
inline void few_rows(const Element<T>* a, int64_t a_stride, int64_t rows, const T* w, int64_t stride, int64_t depth,
                     int64_t begin, int64_t end, Wide<T>* out, int64_t out_stride) {
  constexpr int kColumnsOnce = 4;
  for (int64_t n = begin; n < end;) {
    const int columns = end - n < kColumnsOnce ? 1 : kColumnsOnce;
    for (int64_t m = 0; m < rows; m += kFew) {
      const int64_t count = rows - m < kFew ? rows - m : kFew;
      const Element<T>* of[kFew] = {};
      for (int64_t i = 0; i < count; ++i) of[i] = a + (m + i) * a_stride;
      Wide<T> sums[kFew * kColumnsOnce];
      if (columns == 1) {
        dots_of<T, 1>(count, of, w + n * stride, stride, depth, sums);
      } else {
        dots_of<T, kColumnsOnce>(count, of, w + n * stride, stride, depth, sums);
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int j = 0; j < columns; ++j) out[(m + i) * out_stride + n + j] = sums[i * columns + j];
      }
    }
    n += columns;
  }
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
