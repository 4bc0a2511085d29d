// One layer of the image models, between a small and a large grid of pixels, n images at a time, channels last:
//
//     large pixel (2h + i, 2w + j) meets small pixel (h, w) at tap (i, j), 0 <= i, j < kernel
//     gather     small[h, w, s]  = sum over i, j, l of large[2h + i, 2w + j, l]·weight[s, l, i, j]
//     scatter    large[y, x, l]  = sum over the (h, w, i, j) that meet there, and s, of small[h, w, s]·weight[s, l, i, j]
//
// A convolution gathers forward and scatters backward, a transposed one the other way round; PyTorch lays the weights of
// both out as [s, l, i, j]. A dense layer is a grid of one pixel with a kernel of one. Nothing is unrolled into patches:
//
//   - gather: under one row of the kernel the patch is one run of kernel·l values, so that a product's left operand is a
//     pointer a pixel with `kernel` segments;
//   - scatter: a tap is a product that adds to the sums of the large pixels it falls on, of which no two are the same.
//
// Neither multiplies by a padding. Results are passed, a pixel and some of its channels at a time, to a function `post`
// (bias, activation, rounding) while they are in the cache. One thread computes an image, so its sums have one order.
#pragma once

#include "../parts/team.h"
#include "conv_tile.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

struct Layer {
  int64_t small, small_channels, large, large_channels, kernel;  // grids by their side

  int64_t small_pixels() const { return small * small; }
  int64_t large_pixels() const { return large * large; }
  int64_t small_size() const { return small_pixels() * small_channels; }
  int64_t large_size() const { return large_pixels() * large_channels; }
  int64_t taps() const { return kernel * kernel; }
  int64_t run() const { return kernel * large_channels; }  // contiguous values under a row of the kernel
  int64_t weights() const { return small_channels * large_channels * taps(); }
};

// Cuts a thread's working memory into arrays; with no memory it counts the bytes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class X>
  X* take(int64_t count) {
    X* result = memory_ == nullptr ? nullptr : reinterpret_cast<X*>(memory_ + used_);
    used_ += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
    return result;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Calls f(i, count) for `n` values, a vector at a time; count says how many of the last are left.
template <class T, class F>
inline void each_vector(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes<T>) f(i, n - i < kLanes<T> ? n - i : kLanes<T>);
}

// The first `count` lanes, 0 in the others. Masked loads have neither a loop nor a detour through memory.
template <class X>
inline Vector<Wide<X>> load_some(const X* from, int64_t count) {
  if (count == kLanes<X>) return load(from);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<X, float>) {
    return (Floats)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
  } else if constexpr (std::is_same_v<X, Bf16>) {
    const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
    return (Floats)(__builtin_convertvector((Halves)bits, Words) << 16);
  }
#endif
  return load(from, count);
}

template <class X>
inline void store_some(X* to, Vector<Wide<X>> x, int64_t count) {
  if (count == kLanes<X>) {
    store(to, x);
  } else {
    store(to, x, count);
  }
}

// Images that a thread takes at a time: about `wanted`, so that all threads have as many.
inline int64_t group_of(int64_t images, int64_t threads, int64_t wanted) {
  const int64_t rounds = (images + threads * wanted - 1) / (threads * wanted);
  const int64_t group = (images + threads * rounds - 1) / (threads * (rounds > 0 ? rounds : 1));
  return group > 0 ? group : 1;
}

// So many rows of a product read the packed weights once.
constexpr int64_t kWantedRows = 128;

inline int64_t wanted_images(const Layer& layer) {
  return layer.small_pixels() < kWantedRows ? kWantedRows / layer.small_pixels() : 1;
}

// Images of T as products read them. `channels` of a pixel must be even where operands are pairs.
template <class T>
constexpr bool kReadsInPlace = std::is_same_v<T, Element<T>>;

// ---- gather

constexpr int64_t kChunkRows = 64;  // sums in the first-level cache

template <class T>
struct GatherBuffer {
  Wide<T>* sums;           // [kChunkRows, kSumVectors vectors]
  const Element<T>** a;    // [kChunkRows]
  Wide<T>** out;           // [kChunkRows]

  explicit GatherBuffer(Arena& arena)
      : sums(arena.take<Wide<T>>(kChunkRows * kSumVectors * kLanes<T>)),
        a(arena.take<const Element<T>*>(kChunkRows)),
        out(arena.take<Wide<T>*>(kChunkRows)) {}
};

// The pixels of a grid `side` wide, line after line, `step` apart and lines `line`, and then those of the next image.
template <class X>
class Walk {
 public:
  Walk(X* first, int64_t side, int64_t step, int64_t line, int64_t image)
      : at_(first), side_(side), step_(step), to_line_(line - side * step), to_image_(image - side * line) {}

  X* next() {
    X* const result = at_;
    at_ += step_;
    if (++w_ == side_) {
      w_ = 0;
      at_ += to_line_;
      if (++h_ == side_) {
        h_ = 0;
        at_ += to_image_;
      }
    }
    return result;
  }

 private:
  X* at_;
  int64_t side_, step_, to_line_, to_image_, h_ = 0, w_ = 0;
};

// Products of `rows` patches with a packed matrix of `columns` columns; patches: the first segment of each.
// post(row, column, count, sums) takes `count` columns' sums from `column` on.
template <class T, class Post>
inline void gather_rows(int64_t rows, const Segments& shape, Walk<const Element<T>> patches, const Element<T>* packed,
                        int64_t columns, const GatherBuffer<T>& buffer, const Post& post) {
  const Columns<T> split(columns);
  const int64_t depth = padded<T>(shape.segments * shape.length);
  for (int64_t i = 0; i < kChunkRows; ++i) buffer.out[i] = buffer.sums + i * kSumVectors * kLanes<T>;
  for (int64_t first = 0; first < rows; first += kChunkRows) {
    const int64_t count = rows - first < kChunkRows ? rows - first : kChunkRows;
    for (int64_t i = 0; i < count; ++i) buffer.a[i] = patches.next();
    for (int64_t p = 0; p < split.panels; ++p) {
      const int64_t vector = split.first(p), column = vector * kLanes<T>, width = split.width(p) * kLanes<T>;
      product<T>(count, buffer.a, shape, packed + column * depth, split.width(p), false, buffer.out, 0);
      const int64_t wanted = columns - column < width ? columns - column : width;
      for (int64_t i = 0; i < count; ++i) post(first + i, column, wanted, buffer.out[i]);
    }
  }
}

// For `images` images, contiguous from `large` on: post(pixel, column, count, sums), small pixels counted through all.
template <class T, class Post>
inline void gather(const Layer& layer, int64_t images, const Element<T>* large, const Element<T>* packed,
                   const GatherBuffer<T>& buffer, const Post& post) {
  const int64_t line = layer.large * layer.large_channels;
  const Walk<const Element<T>> patches(large, layer.small, 2 * layer.large_channels, 2 * line, layer.large_size());
  gather_rows<T>(images * layer.small_pixels(), {layer.kernel, layer.run(), line}, patches, packed,
                 layer.small_channels, buffer, post);
}

// ---- scatter

template <class T>
inline int64_t scatter_stride(const Layer& layer) {
  return Columns<T>(layer.large_channels).vectors * kLanes<T>;
}

template <class T>
struct ScatterBuffer {
  Wide<T>* sums;         // [images, large pixels, scatter_stride]
  const Element<T>** a;  // [images · small pixels]
  Wide<T>** out;         // the same
};

// For `images` images, contiguous from `small` on: post(pixel, sums) with all channels of a large pixel.
template <class T, class Post>
inline void scatter(const Layer& layer, int64_t images, const Element<T>* small, const Element<T>* packed,
                    const ScatterBuffer<T>& buffer, const Post& post) {
  const int64_t stride = scatter_stride<T>(layer), rows = images * layer.small_pixels();
  const int64_t depth = padded<T>(layer.small_channels), pixels = images * layer.large_pixels();
  Walk<Wide<T>> out(buffer.sums, layer.small, 2 * stride, 2 * layer.large * stride, layer.large_pixels() * stride);
  for (int64_t row = 0; row < rows; ++row) {
    buffer.a[row] = small + row * depth;
    buffer.out[row] = out.next();
  }
  // Where no two taps fall on one pixel, each writes its own.
  const bool add = layer.kernel > 1 && layer.small > 1;
  if (add) __builtin_memset(buffer.sums, 0, pixels * stride * sizeof(Wide<T>));
  const Columns<T> split(layer.large_channels);
  for (int64_t tap = 0; tap < layer.taps(); ++tap, packed += stride * depth) {
    const int64_t offset = (tap / layer.kernel * layer.large + tap % layer.kernel) * stride;
    for (int64_t p = 0; p < split.panels; ++p) {
      const int64_t column = split.first(p) * kLanes<T>;
      product<T>(rows, buffer.a, dense(layer.small_channels), packed + column * depth, split.width(p), add, buffer.out,
                 offset + column);
    }
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel) post(pixel, buffer.sums + pixel * stride);
}

// ---- scatter to few channels

// A transposed convolution to so few channels that a vector would be mostly empty. For an even kernel the large pixels
// (2i + a, 2j + b), 0 <= a, b < 2, all see the same patch of kernel/2 squared small pixels: one gather with 4·channels
// columns from the small grid with kernel/2 - 1 empty pixels around it.
struct Quads {
  Layer layer;
  int64_t half, channels, side, padded_side;

  template <class T>
  static Quads of(const Layer& layer) {
    const int64_t half = layer.kernel / 2;
    return {layer, half, padded<T>(layer.small_channels), layer.small + half - 1, layer.small + 2 * (half - 1)};
  }
  int64_t columns() const { return 4 * layer.large_channels; }
  int64_t depth() const { return half * half * channels; }
  int64_t padded_size() const { return padded_side * padded_side * channels; }
};

// One image with zeros around it.
template <class T>
inline void pad_image(const Quads& quads, const T* small, Element<T>* to) {
  const int64_t margin = quads.half - 1, channels = quads.layer.small_channels;
  __builtin_memset(to, 0, quads.padded_size() * sizeof *to);
  for (int64_t h = 0; h < quads.layer.small; ++h) {
    for (int64_t w = 0; w < quads.layer.small; ++w, small += channels) {
      to_operands<T>(small, channels, to + ((h + margin) * quads.padded_side + w + margin) * quads.channels);
    }
  }
}

// One image: post(large pixel, first value, values, sums) with the channels of two neighbours, or some of them.
template <class T, class Post>
inline void scatter_quads(const Quads& quads, const Element<T>* image, const Element<T>* packed,
                          const GatherBuffer<T>& buffer, const Post& post) {
  const int64_t line = quads.padded_side * quads.channels, pair = 2 * quads.layer.large_channels;
  const Walk<const Element<T>> patches(image, quads.side, quads.channels, line, 0);
  const auto halves = [&](int64_t row, int64_t column, int64_t count, const Wide<T>* sums) {
    const int64_t pixel = row / quads.side * 2 * quads.layer.large + row % quads.side * 2, end = column + count;
    for (int64_t a = 0; a < 2; ++a) {
      const int64_t first = a * pair < column ? column : a * pair, last = (a + 1) * pair < end ? (a + 1) * pair : end;
      if (first < last) post(pixel + a * quads.layer.large, first - a * pair, last - first, sums + first - column);
    }
  };
  gather_rows<T>(quads.side * quads.side, {quads.half, quads.half * quads.channels, line}, patches, packed,
                 quads.columns(), buffer, halves);
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
