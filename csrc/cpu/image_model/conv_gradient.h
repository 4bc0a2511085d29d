// A layer's weight gradient: for every tap, the products of the small and the large pixels that meet there,
//
//     grad[s, l, i, j] = sum over images and (h, w) of small[h, w, s]·large[2h + i, 2w + j, l]
//
// For one row i of the kernel the right-hand values are one run (j, l), so the gradient is `kernel` matrices [s, (j, l)].
// Threads share their tiles; each runs through all pixels, in groups of images that the second-level cache holds: a tile
// adds a group's sum to its place in memory. A layer of few weights has one place a group instead, and a thread computes
// all of it; those are added afterwards, in order. Either way the result does not depend on the number of threads.
//
// Floats are read where they are. Otherwise a group is first written in the form that tiles read:
//   - pairs of bfloat16: two small pixels beside each other, and with every large pixel the one two further on, which
//     the second of them meets;
//   - patches: the runs of all rows of the kernel side by side, where one run would fill its vectors badly (3 channels).
#pragma once

#include "conv_pack.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

constexpr int64_t kGradientPixels = 160;  // a group has about so many: their sum outweighs loading and storing the tile

template <class T>
struct GradientPlan {
  Layer layer;
  bool patches, staged, separate;  // separate: sums of each group for themselves
  int64_t group;                          // images
  int64_t line;                           // units (pixels, or pairs of them) in a line of small pixels
  int64_t matrices, columns, stride;      // of the gradient as tiles see it; stride of its rows
  int64_t units, small_slot, large_slot;  // of a group: units, and operands where they are staged

  explicit GradientPlan(const Layer& x) : layer(x) {
    constexpr int64_t pair = kPair<T>;
    separate = x.kernel > 1 && x.run() < kSumVectors * kLanes<T>;
    patches = separate || x.run() % kLanes<T> != 0 || (pair == 2 && x.small == 1);
    staged = patches || pair == 2 || !kReadsInPlace<T>;
    group = x.small == 1 ? 256 : (kGradientPixels + x.small_pixels() - 1) / x.small_pixels();
    line = (x.small + pair - 1) / pair;
    matrices = patches ? 1 : x.kernel;
    columns = patches ? x.kernel * x.run() : x.run();
    stride = Columns<T>(columns).vectors * kLanes<T>;
    units = units_of(group);
    small_slot = units * pair * x.small_channels;
    large_slot = (patches ? units * stride : group * x.large_size()) * pair + kLanes<T> * pair;
  }

  int64_t units_of(int64_t images) const {
    return patches ? (images * layer.small_pixels() + kPair<T> - 1) / kPair<T> : images * layer.small * line;
  }
  int64_t sums() const { return matrices * layer.small_channels * stride; }
  // Memory for sums, where add_gradient takes `images` at most.
  int64_t memory(int64_t images) const { return sums() * (separate ? 1 + (images + group - 1) / group : 1); }
  // Whether sums are laid out as PyTorch's weights already.
  bool in_place() const { return layer.taps() == 1 && stride == columns; }

  int64_t small_at(int64_t unit) const { return unit * kPair<T> * layer.small_channels; }
  int64_t large_at(int64_t unit) const {
    if (patches) return unit * kPair<T> * stride;
    const int64_t n = unit / (layer.small * line), h = unit / line % layer.small, w = unit % line * kPair<T>;
    return (n * layer.large_size() + (2 * h * layer.large + 2 * w) * layer.large_channels) * kPair<T>;
  }
};

// One unit's values: of one pixel, or of two, alternating (`second` may be nullptr: zeros). Whole vectors are written: what
// follows the values is zero until it is written itself.
template <class T>
inline void stage_unit(const T* first, const T* second, int64_t n, Element<T>* to) {
  each_vector<T>(n, [&](int64_t i, int64_t count) {
    if constexpr (kPair<T> == 2) {
      const Words other = second == nullptr ? Words{} : (Words)load_some(second + i, count);
      const Words pair = (Words)load_some(first + i, count) >> 16 | other;
      __builtin_memcpy(to + 2 * i, &pair, sizeof pair);
    } else {
      store(to + i, load_some(first + i, count));
    }
  });
}

template <class T>
inline void stage_small(const GradientPlan<T>& plan, const T* small, int64_t images, Element<T>* to) {
  const int64_t channels = plan.layer.small_channels, pixels = images * plan.layer.small_pixels();
  const int64_t length = plan.patches ? pixels : plan.layer.small;  // of what pairs must not cross the end of
  for (int64_t first = 0; first < pixels; first += length) {
    for (int64_t p = first; p < first + length; p += kPair<T>) {
      const T* from = small + p * channels;
      stage_unit<T>(from, p + 1 < first + length ? from + channels : nullptr, channels, to);
      to += kPair<T> * channels;
    }
  }
}

template <class T>
inline void stage_patches(const GradientPlan<T>& plan, const T* large, int64_t images, Element<T>* to) {
  const Layer& layer = plan.layer;
  const int64_t pixels = images * layer.small_pixels(), line = layer.large * layer.large_channels, run = layer.run();
  Walk<const T> patches(large, layer.small, 2 * layer.large_channels, 2 * line, layer.large_size());
  for (int64_t p = 0; p < pixels; p += kPair<T>, to += plan.stride * kPair<T>) {
    const T* first = patches.next();
    const T* second = kPair<T> == 2 && p + 1 < pixels ? patches.next() : nullptr;
    for (int64_t i = 0; i < layer.kernel; ++i) {
      stage_unit<T>(first + i * line, second == nullptr ? nullptr : second + i * line, run, to + i * run * kPair<T>);
    }
    for (int64_t c = plan.columns * kPair<T>; c < plan.stride * kPair<T>; ++c) to[c] = Element<T>{};
  }
}

template <class T>
inline void stage_large(const GradientPlan<T>& plan, const T* large, int64_t images, Element<T>* to) {
  const Layer& layer = plan.layer;
  if (plan.patches) return stage_patches(plan, large, images, to);
  if constexpr (kPair<T> == 2) {
    const int64_t line = layer.large * layer.large_channels, two = 2 * layer.large_channels;
    for (int64_t y = 0; y < images * layer.large; ++y, large += line, to += 2 * line) {
      stage_unit<T>(large, large + two, line - two, to);
      stage_unit<T>(large + line - two, nullptr, two, to + 2 * (line - two));
    }
  } else {
    to_operands<T>(large, images * layer.large_size(), to);
  }
}

// Working memory: tables that every thread fills for itself, and where a thread's slot is. slot(rank) has small_slot
// and then large_slot operands.
template <class Slot>
struct GradientBuffer {
  Slot slot;
  int64_t *small_at, *large_at;
};

// This thread's tiles of sums (+)= one group.
template <class T>
inline void add_group(const GradientPlan<T>& plan, const Element<T>* small, const Element<T>* large, const Pixels& pixels,
                      bool add, const Team& team, Wide<T>* sums) {
  const int64_t channels = plan.layer.small_channels, blocks = (channels + kSumRows - 1) / kSumRows;
  const Columns<T> split(plan.columns);
  const Range own = share(plan.matrices * split.panels * blocks, team);
  for (int64_t tile = own.begin; tile < own.end; ++tile) {
    const int64_t block = tile % blocks, p = tile / blocks % split.panels, i = tile / blocks / split.panels;
    const int64_t s = block * kSumRows, rows = channels - s < kSumRows ? channels - s : kSumRows;
    const int64_t column = split.first(p) * kLanes<T>;
    const Element<T>* from = large + (i * plan.layer.large * plan.layer.large_channels + column) * kPair<T>;
    outer<T>(rows, split.width(p), small + s * kPair<T>, from, pixels, add,
             sums + (i * channels + s) * plan.stride + column, plan.stride);
  }
}

template <class T>
inline void stage_group(const GradientPlan<T>& plan, const T* small, const T* large, int64_t first, int64_t images,
                        Element<T>* slot) {
  stage_small(plan, small + first * plan.layer.small_size(), images, slot);
  stage_large(plan, large + first * plan.layer.large_size(), images, slot + plan.small_slot);
}

// The way of layers with few weights; `sums` is followed by those of each group.
template <class T, class Slot>
inline void add_separately(const GradientPlan<T>& plan, const T* small, const T* large, int64_t images, bool add,
                           const Team& team, const GradientBuffer<Slot>& buffer, Wide<T>* sums) {
  const int64_t count = (images + plan.group - 1) / plan.group, size = plan.sums();
  const Range own = share(count, team);
  for (int64_t g = own.begin; g < own.end; ++g) {
    const int64_t first = g * plan.group, left = images - first, in_group = left < plan.group ? left : plan.group;
    Element<T>* slot = buffer.slot(team.rank);
    stage_group(plan, small, large, first, in_group, slot);
    const Pixels pixels{buffer.small_at, buffer.large_at, plan.units_of(in_group)};
    add_group(plan, slot, slot + plan.small_slot, pixels, false, Team{0, 1}, sums + (1 + g) * size);
  }
  team.barrier();
  const Range part = share(size / kLanes<T>, team);
  for (int64_t i = part.begin * kLanes<T>; i < part.end * kLanes<T>; i += kLanes<T>) {
    Vector<Wide<T>> sum = add ? load(sums + i) : Vector<Wide<T>>{};
    for (int64_t g = 1; g <= count; ++g) sum += load(sums + g * size + i);
    store(sums + i, sum);
  }
}

// So few threads do better to write every group each for itself than to read what another core has in its cache.
constexpr int kFewThreads = 2;

// sums (+)= the gradient of `images` images. All threads of the team call it, and a barrier follows before the next call
// or any use of sums.
template <class T, class Slot>
inline void add_gradient(const GradientPlan<T>& plan, const T* small, const T* large, int64_t images, bool add,
                         const Team& team, const GradientBuffer<Slot>& buffer, Wide<T>* sums) {
  for (int64_t u = 0; u < plan.units; ++u) {
    buffer.small_at[u] = plan.small_at(u);
    buffer.large_at[u] = plan.large_at(u);
  }
  if (plan.separate) return add_separately(plan, small, large, images, add, team, buffer, sums);
  const bool together = plan.staged && team.size > kFewThreads;
  const int64_t step = together ? team.size : 1;
  const auto count = [&](int64_t g) {
    const int64_t left = images - g * plan.group;
    return left < plan.group ? left : plan.group;
  };
  for (int64_t base = 0; base * plan.group < images; base += step) {
    const int64_t mine = together ? base + team.rank : base;
    if (plan.staged && count(mine) > 0) {
      stage_group(plan, small, large, mine * plan.group, count(mine), buffer.slot(team.rank));
    }
    if (together) team.barrier();
    for (int64_t g = base; g < base + step && count(g) > 0; ++g) {
      const Pixels pixels{buffer.small_at, buffer.large_at, plan.units_of(count(g))};
      if (plan.staged) {
        const Element<T>* slot = buffer.slot(together ? int(g - base) : team.rank);
        add_group(plan, slot, slot + plan.small_slot, pixels, add || g > 0, team, sums);
      } else if constexpr (kReadsInPlace<T>) {
        add_group(plan, small + g * plan.group * plan.layer.small_size(),
                  large + g * plan.group * plan.layer.large_size(), pixels, add || g > 0, team, sums);
      }
    }
    if (together) team.barrier();
  }
}

// From the sums to PyTorch's order [s, l, i, j].
template <class T>
inline void unpack_gradient(const GradientPlan<T>& plan, const Wide<T>* sums, const Team& team, Wide<T>* grad) {
  const Layer& layer = plan.layer;
  const int64_t channels = layer.large_channels, kernel = layer.kernel;
  const Range own = share(layer.small_channels, team);
  for (int64_t s = own.begin; s < own.end; ++s) {
    for (int64_t i = 0; i < kernel; ++i) {
      const Wide<T>* row = plan.patches ? sums + s * plan.stride + i * layer.run()
                                        : sums + (i * layer.small_channels + s) * plan.stride;
      Wide<T>* to = grad + s * channels * layer.taps() + i * kernel;
      if (kernel == 1) {
        __builtin_memcpy(to, row, channels * sizeof *to);
        continue;
      }
      for (int64_t j = 0; j < kernel; j += kLanes<T>) {
        const int64_t lanes = kernel - j < kLanes<T> ? kernel - j : kLanes<T>;
        turn(row + j * channels, channels, lanes, channels,
             [&](int64_t l, Vector<Wide<T>> x) { store_some(to + l * layer.taps() + j, x, lanes); });
      }
    }
  }
}

// partial[n, c] = sum over an image's rows of x[n, row, c]; a team shares the images.
template <class T>
inline void sum_rows(const T* x, int64_t images, int64_t rows, int64_t columns, const Team& team, Wide<T>* partial) {
  const Range own = share(images, team);
  for (int64_t n = own.begin; n < own.end; ++n) {
    each_vector<T>(columns, [&](int64_t c, int64_t count) {
      Vector<Wide<T>> sum = {};
      const T* from = x + n * rows * columns + c;
      for (int64_t row = 0; row < rows; ++row, from += columns) sum += load_some(from, count);
      store_some(partial + n * columns + c, sum, count);
    });
  }
}

// out[c] = sum over n of partial[n, columns], in order; columns that are `channels` apart belong to one channel. By one
// thread.
template <class Real>
inline void sum_images(const Real* partial, int64_t images, int64_t columns, int64_t channels, Real* out) {
  for (int64_t c = 0; c < channels; ++c) out[c] = 0;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < columns; ++c) out[c % channels] += partial[n * columns + c];
  }
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
