// The two tiles that convolutions are made of. Each keeps its sums in registers:
//
//     product_tile    out[m, n] (+)= sum over k of a[m, k]·b[k, n]        b packed; a by rows, patches of an image
//     outer_tile      out[m, n] (+)= sum over u of small[u, m]·large[u, n]    neither packed: pixels u, both by columns
//
// product.h's tile is as fast, but writes to a buffer with rows of four vectors. Here rows of sums lie anywhere, so that a
// transposed convolution adds each tap's share to the pixels it falls on, and a tile is three vectors wide: 48 channels.
#pragma once

#include "../parts/product.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// Rows and vectors of a tile: its sums, a row of b and a broadcast value fit the registers.
#if defined(__AVX512F__)
constexpr int kSumRows = 8, kSumVectors = 3;
#elif defined(__AVX2__)
constexpr int kSumRows = 6, kSumVectors = 2;
#else
constexpr int kSumRows = 4, kSumVectors = 2;
#endif

template <class T>
constexpr int64_t kLanes = kWidth<Wide<T>>;

// Columns of a matrix in vectors, and those in panels of at most kSumVectors whose widths differ by at most one.
template <class T>
struct Columns {
  int64_t vectors, panels;

  explicit Columns(int64_t columns)
      : vectors((columns + kLanes<T> - 1) / kLanes<T>), panels((vectors + kSumVectors - 1) / kSumVectors) {}

  int64_t first(int64_t panel) const { return vectors * panel / panels; }  // in vectors
  int64_t width(int64_t panel) const { return first(panel + 1) - first(panel); }
  int64_t panel_of(int64_t vector) const {
    int64_t panel = vector / kSumVectors;
    while (first(panel + 1) <= vector) ++panel;
    return panel;
  }
};

// sums += one row of the panel times its values in rows of a.
template <class T, int Rows, int Vectors>
inline void add_term(const Element<T>* const (&row)[Rows], int64_t k, const Element<T>* panel,
                     Vector<Wide<T>> (&sums)[Rows][Vectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    const auto value = broadcast<T>(row[i] + k);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      sums[i][v] = multiply_add<T>(value, panel + v * kLanes<T> * kPair<T>, sums[i][v]);
    }
  }
}

// A row of a left operand: `segments` runs of `length` values, `stride` apart. A dense matrix has one run, the patch under
// a convolution's kernel has one an image row.
struct Segments {
  int64_t segments, length, stride;
};

inline Segments dense(int64_t length) { return {1, length, 0}; }

// sums += the terms of the segments [first, last), of each from k on and kTerms at most. Returns the
// panel's next row. So few sums as a narrow panel has would wait for one another: they take turns with a second set.
template <class T, int Rows, int Vectors>
inline const Element<T>* sum_terms(const Element<T>* const* a, const Segments& shape, int64_t first, int64_t last,
                                   int64_t k, const Element<T>* panel, Vector<Wide<T>> (&sums)[Rows][Vectors]) {
  constexpr int64_t step = Vectors * kLanes<T> * kPair<T>;
  const int64_t end = shape.length - k < kTerms ? shape.length : k + kTerms;
  Vector<Wide<T>> others[Rows][Vectors] = {};
  for (int64_t s = first; s < last; ++s) {
    const Element<T>* row[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) row[i] = a[i] + s * shape.stride;
    int64_t at = k;
    if constexpr (Vectors == 1) {
      for (; at + kPair<T> < end; at += 2 * kPair<T>, panel += 2 * step) {
        add_term<T>(row, at, panel, sums);
        add_term<T>(row, at + kPair<T>, panel + step, others);
      }
    }
    for (; at < end; at += kPair<T>, panel += step) add_term<T>(row, at, panel, sums);
  }
  if constexpr (Vectors == 1) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) sums[i][0] += others[i][0];
  }
  return panel;
}

// `a` and `out` point to rows; rows of the panel are Vectors vectors.
template <class T, int Rows, int Vectors>
inline void product_tile(const Element<T>* const* a, const Segments& shape, const Element<T>* panel, bool add,
                         Wide<T>* const* out, int64_t offset) {
  const int64_t together = shape.length < kTerms ? kTerms / shape.length : 1;
  for (int64_t s = 0; s < shape.segments; s += together) {
    const int64_t last = shape.segments - s < together ? shape.segments : s + together;
    for (int64_t k = 0; k < shape.length; k += kTerms) {
      Vector<Wide<T>> sums[Rows][Vectors] = {};
      panel = sum_terms<T>(a, shape, s, last, k, panel, sums);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          Wide<T>* to = out[i] + offset + v * kLanes<T>;
          store(to, add ? load(to) + sums[i][v] : sums[i][v]);
        }
      }
      add = true;
    }
  }
}

template <class T, int Vectors, int Rows = kSumRows>
inline void product_rows(int64_t rows, const Element<T>* const* a, const Segments& shape, const Element<T>* panel,
                         bool add, Wide<T>* const* out, int64_t offset) {
  if constexpr (Rows == kSumRows) {
    for (; rows >= Rows; rows -= Rows, a += Rows, out += Rows) {
      product_tile<T, Rows, Vectors>(a, shape, panel, add, out, offset);
    }
  } else if (rows == Rows) {
    return product_tile<T, Rows, Vectors>(a, shape, panel, add, out, offset);
  }
  if constexpr (Rows > 1) {
    if (rows > 0) product_rows<T, Vectors, Rows - 1>(rows, a, shape, panel, add, out, offset);
  }
}

// out[m] + offset (+)= row a[m] · the panel of `vectors` vectors, for any number of rows.
template <class T>
inline void product(int64_t rows, const Element<T>* const* a, const Segments& shape, const Element<T>* panel,
                    int64_t vectors, bool add, Wide<T>* const* out, int64_t offset) {
  if (vectors == 1) return product_rows<T, 1>(rows, a, shape, panel, add, out, offset);
  if (vectors == 2) return product_rows<T, 2>(rows, a, shape, panel, add, out, offset);
  if constexpr (kSumVectors > 2) product_rows<T, 3>(rows, a, shape, panel, add, out, offset);
}

// Where each pixel of a group lies, in elements.
struct Pixels {
  const int64_t *small, *large;
  int64_t count;
};

// Rows of `out` are `stride` apart. Where elements come in pairs, a "pixel" is two: their values lie side by side.
template <class T, int Rows, int Vectors>
inline void outer_tile(const Element<T>* small, const Element<T>* large, const Pixels& pixels, bool add, Wide<T>* out,
                       int64_t stride) {
  constexpr int64_t step = kLanes<T> * kPair<T>;
  Vector<Wide<T>> sums[Rows][Vectors] = {};
  for (int64_t u = 0; u < pixels.count; ++u) {
    const Element<T>* m = small + pixels.small[u];
    const Element<T>* n = large + pixels.large[u];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const auto value = broadcast<T>(m + i * kPair<T>);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[i][v] = multiply_add<T>(value, n + v * step, sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    Wide<T>* row = out + i * stride;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      store(row + v * kLanes<T>, add ? load(row + v * kLanes<T>) + sums[i][v] : sums[i][v]);
    }
  }
}

template <class T, int Vectors, int Rows = kSumRows>
inline void outer_rows(int64_t rows, const Element<T>* small, const Element<T>* large, const Pixels& pixels, bool add,
                       Wide<T>* out, int64_t stride) {
  if (rows == Rows) return outer_tile<T, Rows, Vectors>(small, large, pixels, add, out, stride);
  if constexpr (Rows > 1) outer_rows<T, Vectors, Rows - 1>(rows, small, large, pixels, add, out, stride);
}

// Up to kSumRows rows and kSumVectors vectors.
template <class T>
inline void outer(int64_t rows, int64_t vectors, const Element<T>* small, const Element<T>* large, const Pixels& pixels,
                  bool add, Wide<T>* out, int64_t stride) {
  if (vectors == 1) return outer_rows<T, 1>(rows, small, large, pixels, add, out, stride);
  if (vectors == 2) return outer_rows<T, 2>(rows, small, large, pixels, add, out, stride);
  if constexpr (kSumVectors > 2) outer_rows<T, 3>(rows, small, large, pixels, add, out, stride);
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
