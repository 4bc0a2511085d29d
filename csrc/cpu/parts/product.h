// Products of a few or many rows with a packed matrix, a panel of columns at a time:
//
//     out[m, n] = sum over k of a[m, k]·b[k, n]
//
// The right operand is packed once into panels of kColumns columns, so that the inner loop reads memory in order: a tile
// of kRows rows by a panel keeps its sums in registers, loads the panel's row k once and broadcasts a[m, k] to it. The sum
// over k runs in one order, so that a result depends neither on how rows are grouped nor on the number of threads. It is
// a sum of sums of some terms: a float that takes up thousands of terms one after the other loses twice as much to
// rounding as MKL does. It lands in a buffer in the first-level cache, where the caller adds bias, activation and
// whatever else follows.
//
// The left operand is a pointer a row. See simd.h on files of this kind.
#pragma once

#include "simd.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// What operands of type T are stored as, and how many successive k lie beside each other. Without bfloat16 instructions
// its values are kept as floats: the same products and the same sums.
#if defined(__AVX512BF16__)
template <class T>
using Element = T;
template <class T>
constexpr int kPair = std::is_same_v<T, Bf16> ? 2 : 1;
#else
template <class T>
using Element = std::conditional_t<std::is_same_v<T, Bf16>, float, T>;
template <class T>
constexpr int kPair = 1;
#endif

// Columns in a panel: four cache lines of sums, and of packed operands.
template <class T>
constexpr int64_t kColumns = 256 / sizeof(Wide<T>);

#if defined(__AVX512F__)
constexpr int kTileVectors = 4, kTileRows = 6, kNarrowRows = 8;
#elif defined(__AVX2__)
constexpr int kTileVectors = 2, kTileRows = 6, kNarrowRows = 6;
#else
constexpr int kTileVectors = 2, kTileRows = 4, kNarrowRows = 4;
#endif

// Terms that are summed before they join the total, about: a stretch. All rows read the same stretch of a panel so often
// that it stays in a cache, the second-level one or, if it is short, the first-level one; the next is fetched meanwhile.
constexpr int64_t kTerms = 256, kFewTerms = 64;

template <class T>
inline int64_t padded(int64_t k) {
  return (k + kPair<T> - 1) / kPair<T> * kPair<T>;
}

inline int64_t panels(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// Elements of a packed panel of `depth` rows.
template <class T>
inline int64_t panel_size(int64_t depth) {
  return padded<T>(depth) * kColumns<T>;
}

// Elements of a packed matrix.
template <class T>
inline int64_t packed_size(int64_t depth, int64_t columns) {
  return panel_size<T>(depth) * panels(columns, kColumns<T>);
}

// Vectors as the product reads them: of T's values in operand form.
template <class T>
inline void store_operand(Element<T>* to, Vector<Wide<T>> x) {
  if constexpr (std::is_same_v<T, Bf16> && std::is_same_v<Element<T>, float>) {
    Bf16 rounded[kWidth<float>];
    store(rounded, x);
    store(to, load(rounded));
  } else {
    store(to, x);
  }
}

template <class T>
inline Element<T> operand(Wide<T> x) {
  if constexpr (std::is_same_v<T, Element<T>>) {
    return narrow<T>(x);
  } else {
    return widen(narrow<T>(x));
  }
}

// `n` values in operand form; an odd one is followed by a zero where operands come in pairs.
template <class T, class From>
inline void to_operands(const From* from, int64_t n, Element<T>* to) {
  constexpr int width = kWidth<Wide<T>>;
  int64_t i = 0;
  for (; i + width <= n; i += width) store_operand<T>(to + i, load(from + i));
  for (; i < n; ++i) to[i] = operand<T>(widen(from[i]));
  for (; i < padded<T>(n); ++i) to[i] = Element<T>{};
}

// ---- packing

// In place: lane j of rows[i] and lane i of rows[j] change places.
template <class V>
inline void transpose(V* rows) {
  constexpr int width = sizeof(V) / sizeof(rows[0][0]);
  using Lane = std::conditional_t<sizeof(rows[0][0]) == 8, int64_t, int32_t>;
  using Mask __attribute__((vector_size(sizeof(V)))) = Lane;
#pragma GCC unroll 4
  for (int step = 1; step < width; step *= 2) {
    Mask low, high;
    for (int lane = 0; lane < width; ++lane) {
      low[lane] = lane & step ? width + (lane ^ step) : lane;
      high[lane] = lane & step ? width + lane : lane ^ step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) {
      if (i & step) continue;
      const V a = rows[i], b = rows[i | step];
#if defined(__clang__)
      V first, second;
      for (int lane = 0; lane < width; ++lane) {
        first[lane] = low[lane] < width ? a[low[lane]] : b[low[lane] - width];
        second[lane] = high[lane] < width ? a[high[lane]] : b[high[lane] - width];
      }
      rows[i] = first;
      rows[i | step] = second;
#else
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i | step] = __builtin_shuffle(a, b, high);
#endif
    }
  }
}

// Number (k, n) of the matrix is source[k·k_stride + n·n_stride].
template <class T>
struct Source {
  const T* data;
  int64_t k_stride, n_stride;

  Element<T> at(int64_t k, int64_t n) const {
    if constexpr (std::is_same_v<T, Element<T>>) {
      return data[k * k_stride + n * n_stride];
    } else {
      return widen(data[k * k_stride + n * n_stride]);
    }
  }
};

// One word of a panel: a number, or a pair of bfloat16.
template <class T>
inline int64_t panel_word(int64_t k, int64_t n) {
  return (k / kPair<T> * kColumns<T> + n) * kPair<T> + k % kPair<T>;
}

// A square of words whose k are contiguous in memory: read by column, turned, written by row.
template <class T>
inline void pack_turned(const Source<T>& source, int64_t k, int64_t n, Element<T>* panel) {
  constexpr int width = kWidth<Wide<T>>;
  Vector<Wide<T>> words[width];
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    const T* column = source.data + (n + i) * source.n_stride + k;
    if constexpr (kPair<T> == 2) {
      __builtin_memcpy(&words[i], column, sizeof words[i]);
    } else {
      words[i] = load(column);
    }
  }
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    __builtin_memcpy(panel + panel_word<T>(k + i * kPair<T>, n), &words[i], sizeof words[i]);
  }
}

// A vector of columns of one row of words, whose n are contiguous in memory.
template <class T>
inline void pack_straight(const Source<T>& source, int64_t k, int64_t n, Element<T>* panel) {
  const T* row = source.data + k * source.k_stride + n;
  Element<T>* to = panel + panel_word<T>(k, n);
  if constexpr (kPair<T> == 2) {
    const Words low = (Words)load(row) >> 16, high = (Words)load(row + source.k_stride);
    const Words pair = low | high;
    __builtin_memcpy(to, &pair, sizeof pair);
  } else {
    store(to, load(row));
  }
}

// Packs rows [begin, end) of `columns` <= kColumns columns, and zeros for the columns that a panel has besides.
template <class T>
inline void pack_rows(const Source<T>& source, int64_t begin, int64_t end, int64_t columns, Element<T>* panel) {
  constexpr int64_t width = kWidth<Wide<T>>, words = width * kPair<T>;
  const bool turned = source.k_stride == 1, straight = source.n_stride == 1;
  const int64_t unit = turned ? words : kPair<T>;
  const int64_t whole = turned || straight ? begin + (end - begin) / unit * unit : begin;
  const int64_t wide = columns / width * width;
  if (whole < end || wide < kColumns<T>) {
    const int64_t from = begin * kColumns<T>;
    __builtin_memset(panel + from, 0, (panel_size<T>(end) - from) * sizeof *panel);
  }
  for (int64_t k = begin; k < whole; k += unit) {
    for (int64_t n = 0; n < wide; n += width) turned ? pack_turned(source, k, n, panel) : pack_straight(source, k, n, panel);
  }
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t n = k < whole ? wide : 0; n < columns; ++n) panel[panel_word<T>(k, n)] = source.at(k, n);
  }
}

// Packs panels [first, last) of a matrix [depth, columns]; `packed` is the whole one's beginning. Some rows of all
// panels, then the next: where rows are contiguous, a page of them is read at once.
template <class T>
inline void pack(const Source<T>& source, int64_t depth, int64_t columns, int64_t first, int64_t last,
                 Element<T>* packed) {
  const int64_t rows = source.k_stride == 1 ? depth + 1 : 16 * kPair<T>;
  for (int64_t k = 0; k < depth; k += rows) {
    const int64_t end = depth - k < rows ? depth : k + rows;
    for (int64_t p = first; p < last; ++p) {
      const int64_t n = p * kColumns<T>, count = columns - n < kColumns<T> ? columns - n : kColumns<T>;
      const Source<T> from{source.data + n * source.n_stride, source.k_stride, source.n_stride};
      pack_rows(from, k, end, count, packed + p * panel_size<T>(depth));
    }
  }
}

// ---- the tile

// One or two values of a left operand's row in every lane.
template <class T>
inline auto broadcast(const Element<T>* a) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  } else {
    return splat(*a);
  }
#else
  return splat(*a);
#endif
}

template <class T, class A>
inline Vector<Wide<T>> multiply_add(A a, const Element<T>* b, Vector<Wide<T>> sum) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, a, (__m512bh)_mm512_loadu_si512(b));
  } else {
    return a * load(b) + sum;
  }
#else
  return a * load(b) + sum;
#endif
}

// What the tile reads next, so that it is there in time: a hint, nullptr for none.
constexpr int64_t kAhead = 16;  // rows of a panel

// out[i, v] (+)= rows i of a · the panel's columns from `panel` on, Count vectors of them. Rows of `out` are kColumns
// apart. `next` (or nullptr) is read ahead, as many bytes as the panel's part has.
template <class T, int Count, int Vectors>
inline void tile(const Element<T>* const* a, int64_t depth, const Element<T>* panel, const Element<T>* next,
                 bool accumulate, Wide<T>* out) {
  constexpr int width = kWidth<Wide<T>>;
  constexpr int64_t step = kColumns<T> * kPair<T>;
  Vector<Wide<T>> sums[Count][Vectors];
  const Element<T>* row[Count];  // in registers
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) {
    row[i] = a[i];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      sums[i][v] = Vector<Wide<T>>{};
    }
  }
  const int64_t ahead = next != nullptr ? next - panel : kAhead * step;
  for (int64_t k = 0; k < depth; k += kPair<T>, panel += step) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(panel + ahead + v * width * kPair<T>, 0, 3);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      const auto value = broadcast<T>(row[i] + k);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        sums[i][v] = multiply_add<T>(value, panel + v * width * kPair<T>, sums[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      Wide<T>* to = out + i * kColumns<T> + v * width;
      store(to, accumulate ? load(to) + sums[i][v] : sums[i][v]);
    }
  }
}

// The same for a number of rows that is known only now, up to `Count`.
template <class T, int Vectors, int Count>
inline void tile_of(int64_t count, const Element<T>* const* a, int64_t depth, const Element<T>* panel,
                    const Element<T>* next, bool accumulate, Wide<T>* out) {
  if constexpr (Count > 1) {
    if (count < Count) return tile_of<T, Vectors, Count - 1>(count, a, depth, panel, next, accumulate, out);
  }
  tile<T, Count, Vectors>(a, depth, panel, next, accumulate, out);
}

// Rows [0, count) against the first `vectors` vectors of a panel's columns.
template <class T>
inline void tiles(int64_t count, const Element<T>* const* a, int64_t depth, const Element<T>* panel,
                  int64_t vectors, const Element<T>* next, bool accumulate, Wide<T>* out) {
  constexpr int64_t columns = kWidth<Wide<T>>;
  for (int64_t v = 0; v < vectors; v += kTileVectors) {
    const int64_t left = vectors - v, offset = v * columns * kPair<T>;
    const Element<T>* from = panel + offset;
    const Element<T>* then = next == nullptr ? nullptr : next + offset;
    Wide<T>* to = out + v * columns;
    if (left == 1) {
      tile_of<T, 1, kNarrowRows>(count, a, depth, from, then, accumulate, to);
    } else if (left == 2 || kTileVectors == 2) {
      tile_of<T, 2, kNarrowRows>(count, a, depth, from, then, accumulate, to);
    } else if (left == 3) {
      tile_of<T, 3, kTileRows>(count, a, depth, from, then, accumulate, to);
    } else {
      tile_of<T, kTileVectors, kTileRows>(count, a, depth, from, then, accumulate, to);
    }
  }
}

// Rows [0, m) against one stretch of a panel, `offset` behind the beginning of each row.
template <class T>
inline void multiply_stretch(const Element<T>* const* a, int64_t m, int64_t offset, int64_t depth,
                             const Element<T>* panel, int64_t columns, const Element<T>* next, bool accumulate,
                             Wide<T>* out) {
  const int64_t vectors = panels(columns, kWidth<Wide<T>>), most = vectors > 2 ? kTileRows : kNarrowRows;
  const int64_t blocks = (m + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = m * b / blocks, count = m * (b + 1) / blocks - first;
    const Element<T>* rows[kNarrowRows] = {};
    for (int64_t i = 0; i < count; ++i) rows[i] = a[first + i] + offset;
    tiles<T>(count, rows, depth, panel, vectors, b == 1 ? next : nullptr, accumulate, out + first * kColumns<T>);
  }
}

// out[m, kColumns] = rows of a · one packed panel, of which `columns` are wanted: others may hold anything. About
// `terms` are summed before they join the total.
//
// `next` is the panel that this thread multiplies by afterwards, or nullptr: it is fetched meanwhile.
template <class T>
inline void multiply(const Element<T>* const* a, int64_t m, int64_t depth, const Element<T>* panel, int64_t columns,
                     const Element<T>* next, int64_t terms, Wide<T>* out) {
  const int64_t stretches = depth > terms ? panels(depth, terms) : 1;
  const int64_t length = depth > 0 ? padded<T>(panels(depth, stretches)) : 1;
  for (int64_t k = 0; k == 0 || k < depth; k += length) {
    const int64_t part = depth - k < length ? depth - k : length;
    const Element<T>* then = panel + panel_size<T>(part);
    multiply_stretch<T>(a, m, k, part, panel, columns, k + part < depth ? then : next, k > 0, out);
    panel = then;
  }
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
