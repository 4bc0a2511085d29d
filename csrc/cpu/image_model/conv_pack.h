// A layer's weights [s, l, i, j] in the order in which products read them, and sums of gradients back in that of PyTorch.
//
//     gather     matrix [(i, j, l), s], one; panels of columns s
//     scatter    a matrix [s, l] a tap (i, j); panels of columns l
//     quads      matrix [(a, b, s), (y, x, l)], the taps of a transposed convolution's four classes of pixels
//
// Memory holds the taps of a weight beside each other; a panel wants the channels so. Squares of them are turned in
// registers.
#pragma once

#include "conv_layer.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// Calls put(q, x) for q < count with lane j of x = from[j·stride + q], j < lanes; other lanes are 0.
template <class Real, class Put>
inline void turn(const Real* from, int64_t stride, int64_t lanes, int64_t count, const Put& put) {
  constexpr int64_t width = kWidth<Real>;
  for (int64_t q = 0; q < count; q += width) {
    const int64_t wanted = count - q < width ? count - q : width;
    Vector<Real> rows[width];
    for (int64_t j = 0; j < width; ++j) {
      rows[j] = j < lanes ? load_some(from + j * stride + q, wanted) : Vector<Real>{};
    }
    transpose(rows);
    for (int64_t i = 0; i < wanted; ++i) put(q + i, rows[i]);
  }
}

// Matrices [depth, columns], `count` of them one behind the other, in panels; one vector of columns at a time.
template <class T>
class Panels {
 public:
  // `rows` is a thread's memory for one vector of columns of all matrices, see scratch().
  Panels(int64_t count, int64_t depth, int64_t columns, Element<T>* packed, Wide<T>* rows)
      : count_(count), depth_(depth), columns_(columns), packed_(packed), rows_(rows) {}

  static int64_t scratch(int64_t count, int64_t depth) { return kPair<T> == 2 ? count * depth * kLanes<T> : 0; }
  static int64_t size(int64_t count, int64_t depth, int64_t columns) {
    return count * padded<T>(depth) * Columns<T>(columns).vectors * kLanes<T>;
  }

  // Row k of matrix m: `x` in vector v.
  void put(int64_t m, int64_t k, int64_t v, Vector<Wide<T>> x) const {
    if constexpr (kPair<T> == 2) {
      store(rows_ + (m * depth_ + k) * kLanes<T>, x);
    } else {
      store_operand<T>(at(m, k, v), x);
    }
  }

  // After all rows of vector v: where operands come in pairs, successive rows become one row of pairs.
  void finish(int64_t v) const {
    if constexpr (kPair<T> == 2) {
      for (int64_t m = 0; m < count_; ++m) {
        const Wide<T>* row = rows_ + m * depth_ * kLanes<T>;
        for (int64_t k = 0; k < depth_; k += 2, row += 2 * kLanes<T>) {
          T low[kLanes<T>], high[kLanes<T>] = {};
          store(low, load(row));
          if (k + 1 < depth_) store(high, load(row + kLanes<T>));
          const Words pair = (Words)load(low) >> 16 | (Words)load(high);
          __builtin_memcpy(at(m, k, v), &pair, sizeof pair);
        }
      }
    }
  }

 private:
  Element<T>* at(int64_t m, int64_t k, int64_t v) const {
    const Columns<T> split(columns_);
    const int64_t p = split.panel_of(v), first = split.first(p), lanes = kLanes<T>, depth = padded<T>(depth_);
    const int64_t word = k / kPair<T> * split.width(p) + v - first;
    return packed_ + m * depth * split.vectors * lanes + first * lanes * depth + word * lanes * kPair<T>;
  }

  int64_t count_, depth_, columns_;
  Element<T>* packed_;
  Wide<T>* rows_;
};

template <class T>
inline int64_t packed_gather_size(const Layer& layer) {
  return Panels<T>::size(1, layer.taps() * layer.large_channels, layer.small_channels);
}

template <class T>
inline int64_t packed_scatter_size(const Layer& layer) {
  return Panels<T>::size(layer.taps(), layer.small_channels, layer.large_channels);
}

template <class T>
inline int64_t pack_scratch(const Layer& layer) {
  const int64_t channels = layer.small_channels > layer.large_channels ? layer.small_channels : layer.large_channels;
  return Panels<T>::scratch(layer.taps(), channels);
}

// A team shares the vectors of columns. `rows`: this thread's, pack_scratch numbers.
template <class T>
inline void pack_gather(const Layer& layer, const Wide<T>* weight, const Team& team, Wide<T>* rows, Element<T>* packed) {
  const int64_t taps = layer.taps(), channels = layer.large_channels;
  const Panels<T> panels(1, taps * channels, layer.small_channels, packed, rows);
  const Range own = share(Columns<T>(layer.small_channels).vectors, team);
  for (int64_t v = own.begin; v < own.end; ++v) {
    const int64_t s = v * kLanes<T>, left = layer.small_channels - s, lanes = left < kLanes<T> ? left : kLanes<T>;
    const Wide<T>* from = weight + s * channels * taps;
    if (taps == 1) {
      turn(from, channels, lanes, channels, [&](int64_t l, Vector<Wide<T>> x) { panels.put(0, l, v, x); });
    } else {
      for (int64_t l = 0; l < channels; ++l) {
        turn(from + l * taps, channels * taps, lanes, taps,
             [&](int64_t tap, Vector<Wide<T>> x) { panels.put(0, tap * channels + l, v, x); });
      }
    }
    panels.finish(v);
  }
}

template <class T>
inline void pack_scatter(const Layer& layer, const Wide<T>* weight, const Team& team, Wide<T>* rows,
                         Element<T>* packed) {
  const int64_t taps = layer.taps(), channels = layer.large_channels;
  const Panels<T> panels(taps, layer.small_channels, channels, packed, rows);
  const Range own = share(Columns<T>(channels).vectors, team);
  for (int64_t v = own.begin; v < own.end; ++v) {
    const int64_t l = v * kLanes<T>, left = channels - l, lanes = left < kLanes<T> ? left : kLanes<T>;
    for (int64_t s = 0; s < layer.small_channels; ++s) {
      const Wide<T>* from = weight + (s * channels + l) * taps;
      if (taps == 1) {
        panels.put(0, s, v, load_some(from, lanes));
      } else {
        turn(from, taps, lanes, taps, [&](int64_t tap, Vector<Wide<T>> x) { panels.put(tap, s, v, x); });
      }
    }
    panels.finish(v);
  }
}

template <class T>
inline int64_t packed_quads_size(const Quads& quads) {
  return Panels<T>::size(1, quads.depth(), quads.columns());
}

// By one thread: there are few of them. `rows`: Panels<T>::scratch(1, quads.depth()) numbers.
template <class T>
inline void pack_quads(const Quads& quads, const Wide<T>* weight, Wide<T>* rows, Element<T>* packed) {
  const Layer& layer = quads.layer;
  const Panels<T> panels(1, quads.depth(), quads.columns(), packed, rows);
  for (int64_t v = 0; v < Columns<T>(quads.columns()).vectors; ++v) {
    for (int64_t k = 0; k < quads.depth(); ++k) {
      const int64_t s = k % quads.channels, a = k / quads.channels / quads.half, b = k / quads.channels % quads.half;
      Vector<Wide<T>> x = {};
      for (int64_t j = 0; j < kLanes<T> && s < layer.small_channels; ++j) {
        const int64_t column = v * kLanes<T> + j, l = column % layer.large_channels, class_ = column / layer.large_channels;
        if (column >= quads.columns()) break;
        const int64_t y = class_ / 2 + 2 * (quads.half - 1 - a), z = class_ % 2 + 2 * (quads.half - 1 - b);
        x[j] = weight[(s * layer.large_channels + l) * layer.taps() + y * layer.kernel + z];
      }
      panels.put(0, k, v, x);
    }
    panels.finish(v);
  }
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
