// What the products of the recurrent ops are made of: memory, rows of tensors, left operands and packed weights. On files
// of this kind see simd.h.
#pragma once

#include "product.h"
#include "team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// Rows that a product takes at a time: their sums with one panel fill a third of the first-level cache.
constexpr int64_t kBlockRows = 64;

// Floats of so many terms come from memory rather than a cache: short stretches, the next fetched meanwhile, are faster.
constexpr int64_t kDeep = 1024;

// Gives out pieces of one block of memory. Without one it only counts.
struct Arena {
  char* memory;
  int64_t used = 0;

  template <class X>
  X* take(int64_t count) {
    X* piece = reinterpret_cast<X*>(memory + used);
    used += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
    return memory == nullptr ? nullptr : piece;
  }
};

// A vector of up to `left` numbers; those beyond are 0 and are not touched.
template <class T>
inline Vector<Wide<T>> load_some(const T* from, int64_t left) {
  return left >= kWidth<Wide<T>> ? load(from) : load(from, left);
}

template <class T>
inline void store_some(T* to, Vector<Wide<T>> x, int64_t left) {
  if (left >= kWidth<Wide<T>>) return store(to, x);
  store(to, x, left);
}

template <class T>
inline void store_operand_some(Element<T>* to, Vector<Wide<T>> x, int64_t left) {
  if (left >= kWidth<Wide<T>>) return store_operand<T>(to, x);
  for (int64_t i = 0; i < left; ++i) to[i] = operand<T>(x[i]);
}

// Row `at` of a trace, of which rows have `width` numbers.
template <class X>
inline X* row(void* trace, int64_t at, int64_t width) {
  return static_cast<X*>(trace) + at * width;
}

template <class X>
inline const X* row(const void* trace, int64_t at, int64_t width) {
  return static_cast<const X*>(trace) + at * width;
}

// Numbers of a vector of the network in wide form; zeros up to a whole vector.
template <class T>
struct Widened {
  Wide<T>* data;
  int64_t size;

  Widened(Arena& arena, int64_t size) : data(arena.take<Wide<T>>(size + kWidth<Wide<T>>)), size(size) {}

  void fill(const void* from) const {
    const T* numbers = static_cast<const T*>(from);
    for (int64_t i = 0; i < size; ++i) data[i] = widen(numbers[i]);
    for (int64_t i = 0; i < kWidth<Wide<T>>; ++i) data[size + i] = 0;
  }
  auto at(int64_t i) const { return load(data + i); }
};

// Left operands [rows, width], zero beyond the width. Rows lie a cache line more than they need apart, so that those of
// a width that is a power of two do not meet in the same sets of the cache.
template <class T>
struct Operands {
  Element<T>* data;
  int64_t rows, stride;

  Operands(Arena& arena, int64_t rows, int64_t width)
      : rows(rows), stride((padded<T>(width) * int64_t(sizeof(Element<T>)) / 64 + 2) * 64 / int64_t(sizeof(Element<T>))) {
    data = arena.take<Element<T>>(rows * stride);
  }

  void clear(const Team& team) const {
    const Range mine = share(rows, team);
    __builtin_memset(data + mine.begin * stride, 0, (mine.end - mine.begin) * stride * sizeof *data);
  }
  Element<T>* operator[](int64_t row) const { return data + row * stride; }
};

// A packed right operand [depth, columns].
template <class T>
struct Packed {
  Element<T>* data;
  int64_t depth, columns;

  Packed(Arena& arena, int64_t depth, int64_t columns)
      : data(arena.take<Element<T>>(packed_size<T>(depth, columns))), depth(depth), columns(columns) {}

  // `source` holds its number (k, n) at k·k_stride + n·n_stride.
  void fill(const Team& team, const void* source, int64_t k_stride, int64_t n_stride) const {
    const Range mine = share(panels(columns, kColumns<T>), team);
    pack(Source<T>{static_cast<const T*>(source), k_stride, n_stride}, depth, columns, mine.begin, mine.end, data);
  }

  // Calls finish(row, column, count, sums) for `count` columns of every row of the product that this thread computes.
  // Threads share out vectors of columns, the same ones at every step. `reverse`: from the last to the first, so that a
  // matrix that the cache cannot hold starts with what the step before has left there.
  template <class Finish>
  void multiply(const Team& team, const Operands<T>& a, bool reverse, const Finish& finish) const {
    constexpr int64_t width = kWidth<Wide<T>>, wide = kColumns<T>;
    const Range mine = share(panels(columns, width), team);
    const int64_t first = mine.begin * width / wide, count = panels(mine.end * width, wide) - first;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t panel = reverse ? first + count - 1 - i : first + i, start = panel * wide;
      const int64_t from = start < mine.begin * width ? mine.begin * width : start;
      const int64_t until = start + wide < mine.end * width ? start + wide : mine.end * width;
      const Element<T>* packed = data + panel * panel_size<T>(depth) + (from - start) * kPair<T>;
      const Element<T>* next = i + 1 < count ? data + (reverse ? panel - 1 : panel + 1) * panel_size<T>(depth) : nullptr;
      multiply_panel(packed, a, from, (until < columns ? until : columns) - from, next, finish);
    }
  }

  template <class Finish>
  void multiply_panel(const Element<T>* packed, const Operands<T>& a, int64_t from, int64_t count,
                      const Element<T>* next, const Finish& finish) const {
    alignas(64) Wide<T> sums[kBlockRows * kColumns<T>];
    const Element<T>* rows[kBlockRows];
    const int64_t blocks = (a.rows + kBlockRows - 1) / kBlockRows;
    // Shorter sums are more exact, which rounding to bfloat16 would hide. Few columns cost nothing, and MKL is at its
    // most exact there.
    constexpr bool floats = sizeof(T) == 4;
    constexpr int64_t usual = floats ? kTerms / 2 : kTerms;
    const int64_t terms = (floats && depth >= kDeep) || columns <= kColumns<T> ? kFewTerms : usual;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = a.rows * block / blocks, size = a.rows * (block + 1) / blocks - begin;
      for (int64_t i = 0; i < size; ++i) rows[i] = a[begin + i];
      apv_fast::APV_FAST_ISA::multiply<T>(rows, size, depth, packed, count, next, terms, sums);
      for (int64_t i = 0; i < size; ++i) finish(begin + i, from, count, sums + i * kColumns<T>);
    }
  }
};

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
