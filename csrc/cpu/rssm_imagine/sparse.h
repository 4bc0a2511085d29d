// Latents as their few numbers that are not zero, and their product with a packed weight: a sum of its rows.
// On files of this kind see simd.h.
#pragma once

#include "../parts/operands.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// The numbers of some rows that are not zero: those of row i are [start[i], start[i + 1]). Rows are set in order.
template <class Real>
struct SparseRows {
  int64_t* start;
  int32_t* index;
  Real* value;

  // Of `rows` rows that `threads` share.
  SparseRows(Arena& arena, int64_t rows, int64_t width, int threads)
      : start(arena.take<int64_t>(rows + threads)),
        index(arena.take<int32_t>(rows * width)),
        value(arena.take<Real>(rows * width)) {}

  // A thread's own.
  SparseRows part(const Team& team, const Range& rows, int64_t width) const {
    SparseRows own = *this;
    own.start += rows.begin + team.rank;
    own.index += rows.begin * width;
    own.value += rows.begin * width;
    own.start[0] = 0;
    return own;
  }

  // Row i is `row`, rounded to what products read.
  template <class T>
  void set(int64_t i, const Real* row, int64_t width) const {
    int64_t at = start[i];
    for (int64_t j = 0; j < width; ++j) {
      if (row[j] == 0) continue;
      index[at] = int32_t(j);
      value[at++] = widen(narrow<T>(row[j]));
    }
    start[i + 1] = at;
  }

  // Row i is `count` one-hot variables of `classes` each, that of variable s class chosen[s].
  void set_ones(int64_t i, const int32_t* chosen, int64_t count, int64_t classes) const {
    const int64_t at = start[i];
    for (int64_t s = 0; s < count; ++s) {
      index[at + s] = int32_t(s * classes) + chosen[s];
      value[at + s] = 1;
    }
    start[i + 1] = at + count;
  }
};

// Vector v of row k of a packed panel, from a column on.
template <class T>
inline Vector<Wide<T>> panel_row(const Element<T>* panel, int64_t k, int64_t v) {
  const int64_t at = (k / kPair<T> * kColumns<T> + v * kWidth<Wide<T>>)*kPair<T>;
  if constexpr (kPair<T> == 2) {
    Words pairs;
    __builtin_memcpy(&pairs, panel + at, sizeof pairs);
    return (Floats)(k % 2 ? pairs & 0xffff0000u : pairs << 16);
  } else {
    return load(panel + at);
  }
}

// sums += rows of the packed matrix, from `column` on, that a sparse row weighs: the product of both. `Vectors` of
// them. A start state may have hundreds of numbers that are not zero: so many terms are summed before they join the
// total.
constexpr int64_t kSparseTerms = 64;

template <int Vectors, class T>
inline void add_rows(const Packed<T>& matrix, const SparseRows<Wide<T>>& sparse, int64_t i, int64_t column,
                     Vector<Wide<T>>* sums) {
  const int64_t inside = column % kColumns<T> * kPair<T>;
  const Element<T>* panel = matrix.data + column / kColumns<T> * panel_size<T>(matrix.depth) + inside;
  const int64_t last = sparse.start[i + 1];
  for (int64_t e = sparse.start[i]; e < last;) {
    const int64_t end = last - e < kSparseTerms ? last : e + kSparseTerms;
    Vector<Wide<T>> part[Vectors] = {};
    for (; e < end; ++e) {
      const Wide<T> value = sparse.value[e];
      const int64_t k = sparse.index[e];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) part[v] += value * panel_row<T>(panel, k, v);
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sums[v] += part[v];
  }
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
