// The decoder: a dense layer, then transposed convolutions with kernels 5, 5, 6, 6 and stride 2, ELU after all but the last.
//
// The first of them sees one pixel: it is a product with PyTorch's matrix [s, (l, i, j)] as it is; only its result is put
// in the order of channels last. A thread takes a group of images through the other three at once. Backward, a block of
// images goes through those three, so that the gradients between them stay in the cache and take little memory.

#include "passes.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

enum { kDense, kFirst, kSecond, kThird, kLast, kLayers };
constexpr int64_t kBlock = 32;  // images
constexpr int64_t kFirstSide = 5, kFirstPixels = kFirstSide * kFirstSide;

Layer layer_of(const DecoderArguments& x, int l) {
  const int64_t depth = x.depth;
  switch (l) {
    case kDense: return {1, 32 * depth, 1, x.features, 1};
    case kFirst: return {1, 32 * depth, 1, kFirstPixels * 4 * depth, 1};
    case kSecond: return {kFirstSide, 4 * depth, 13, 2 * depth, 5};
    case kThird: return {13, 2 * depth, 30, depth, 6};
    default: return {30, depth, kImageSide, x.channels, 6};
  }
}

template <class T>
const Wide<T>* weight_of(const DecoderArguments& x, int l) {
  return static_cast<const Wide<T>*>(x.layers[l].weight);
}

template <class T>
class Forward {
 public:
  Forward(const DecoderArguments& x, void* memory)
      : x_(x), arena_(memory), quads_(Quads::of<T>(layer_of(x, kLast))) {
    ThreadMemory<T> sizes;
    for (int l = 0; l < kLayers; ++l) {
      const Layer& layer = layers_[l] = layer_of(x, l);
      groups_[l] = group_of(x.images, x.threads, wanted_images(layer));
      const int64_t size = l == kDense ? packed_gather_size<T>(layer)
                                       : l == kLast ? packed_quads_size<T>(quads_) : packed_scatter_size<T>(layer);
      packed_[l] = arena_.take<Element<T>>(size);
      sizes.grow_pack(layer);
      if (l == kFirst || l == kSecond) sizes.grow_scatter(layer, groups_[l]);
      const int64_t features = padded<T>(layer.large_channels);
      sizes.grow(sizes.staged, groups_[l] * (l == kDense ? features : layer.small_size()));
    }
    sizes.grow_scatter(layers_[kThird], 1);
    sizes.grow(sizes.pack_rows, Panels<T>::scratch(1, quads_.depth()));
    sizes.grow(sizes.staged, quads_.padded_size());
    pair_bias_ = arena_.take<Wide<T>>(2 * x.channels);
    buffers_ = TeamBuffers<T>(sizes, x.threads, arena_);
  }

  int64_t bytes() const { return arena_.used(); }

  void run() const {
    run_team(x_.threads, [&](const Team& team) {
      const ThreadBuffers<T> own = buffers_.of(team.rank);
      pack_gather<T>(layers_[kDense], weight_of<T>(x_, kDense), team, own.pack_rows, packed_[kDense]);
      for (int l = kFirst; l < kLast; ++l) {
        pack_scatter<T>(layers_[l], weight_of<T>(x_, l), team, own.pack_rows, packed_[l]);
      }
      if (team.rank == 0) {
        pack_quads<T>(quads_, weight_of<T>(x_, kLast), own.pack_rows, packed_[kLast]);
        for (int64_t i = 0; i < 2 * x_.channels; ++i) pair_bias_[i] = bias(kLast)[i % x_.channels];
      }
      team.barrier();
      each_group(kDense, team, [&](int64_t first, int64_t count) { dense_layer(first, count, own); });
      team.barrier();
      each_group(kFirst, team, [&](int64_t first, int64_t count) { first_layer(first, count, own); });
      team.barrier();
      each_group(kSecond, team, [&](int64_t first, int64_t count) {
        transposed(kSecond, first, count, own);
        for (int64_t n = first; n < first + count; ++n) {
          transposed(kThird, n, 1, own);
          last_layer(n, own);
        }
      });
    });
  }

 private:
  template <class F>
  void each_group(int l, const Team& team, const F& f) const {
    const Range groups = share((x_.images + groups_[l] - 1) / groups_[l], team);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const int64_t first = g * groups_[l], left = x_.images - first;
      f(first, left < groups_[l] ? left : groups_[l]);
    }
  }

  // Results of layer l, from image `first` on.
  T* output(int l, int64_t first) const {
    const int64_t size = l == kDense ? layers_[l].small_size() : layers_[l].large_size();
    return static_cast<T*>(x_.outputs[l]) + first * size;
  }
  const Wide<T>* bias(int l) const { return static_cast<const Wide<T>*>(x_.layers[l].bias); }

  void dense_layer(int64_t first, int64_t count, const ThreadBuffers<T>& own) const {
    Layer layer = layers_[kDense];
    const T* feat = static_cast<const T*>(x_.feat) + first * layer.large_channels;
    const Element<T>* a = stage_pixels(feat, count, layer.large_channels, own.staged);
    layer.large_channels = padded<T>(layer.large_channels);
    T* out = output(kDense, first);
    gather<T>(layer, count, a, packed_[kDense], own.gather,
              [&](int64_t n, int64_t column, int64_t columns, const Wide<T>* sums) {
                finish<false>(sums, bias(kDense) + column, columns, out + n * layer.small_channels + column);
              });
  }

  // Sums come as [channels, pixels].
  void first_layer(int64_t first, int64_t count, const ThreadBuffers<T>& own) const {
    const Layer& layer = layers_[kFirst];
    const int64_t channels = layer.large_channels / kFirstPixels;
    const Element<T>* a = operands_of<T>(output(kDense, first), count * layer.small_channels, own.staged);
    T* out = output(kFirst, first);
    scatter<T>(layer, count, a, packed_[kFirst], own.scatter, [&](int64_t n, const Wide<T>* sums) {
      each_vector<T>(channels, [&](int64_t c, int64_t lanes) {
        const Vector<Wide<T>> b = load_some(bias(kFirst) + c, lanes);
        turn(sums + c * kFirstPixels, kFirstPixels, lanes, kFirstPixels, [&](int64_t pixel, Vector<Wide<T>> x) {
          store_some(out + n * layer.large_channels + pixel * channels + c, elu(x + b), lanes);
        });
      });
    });
  }

  void transposed(int l, int64_t first, int64_t count, const ThreadBuffers<T>& own) const {
    const Layer& layer = layers_[l];
    const Element<T>* a = operands_of<T>(output(l - 1, first), count * layer.small_size(), own.staged);
    T* out = output(l, first);
    scatter<T>(layer, count, a, packed_[l], own.scatter, [&](int64_t pixel, const Wide<T>* sums) {
      finish<true>(sums, bias(l), layer.large_channels, out + pixel * layer.large_channels);
    });
  }

  void last_layer(int64_t n, const ThreadBuffers<T>& own) const {
    const int64_t channels = layers_[kLast].large_channels;
    pad_image(quads_, output(kThird, n), own.staged);
    T* out = output(kLast, n);
    scatter_quads<T>(quads_, own.staged, packed_[kLast], own.gather,
                     [&](int64_t pixel, int64_t first, int64_t values, const Wide<T>* sums) {
                       finish<false>(sums, pair_bias_ + first, values, out + pixel * channels + first);
                     });
  }

  const DecoderArguments& x_;
  Arena arena_;
  Quads quads_;
  Layer layers_[kLayers];
  int64_t groups_[kLayers];
  Element<T>* packed_[kLayers];
  Wide<T>* pair_bias_;  // of two neighbouring pixels of the last layer
  TeamBuffers<T> buffers_;
};

template <class T>
class Backward {
 public:
  Backward(const DecoderArguments& x, void* memory)
      : x_(x), arena_(memory), block_(x.images < kBlock ? x.images : kBlock),
        gradients_{gradient(kDense), gradient(kFirst), gradient(kSecond), gradient(kThird), gradient(kLast)} {
    ThreadMemory<T> sizes;
    for (int l = 0; l < kLayers; ++l) {
      const Layer& layer = gradients_[l].plan.layer;
      sizes.grow_gradient(gradients_[l].plan);
      sizes.grow_pack(layer);
      packed_[l] = arena_.take<Element<T>>(l == kDense ? packed_scatter_size<T>(layer) : packed_gather_size<T>(layer));
      between_[l] = l == kLast ? nullptr : arena_.take<T>(l < kSecond ? x.images * sums_size(l) : block_ * sums_size(l));
      partial_[l] = arena_.take<Wide<T>>(x.images * (l == kLast ? kImageSide * x.channels : bias_size(l)));
      const int64_t images = wanted_images(layer);
      if (l == kDense) sizes.grow_scatter(layer, images);
      if (!kReadsInPlace<T>) sizes.grow(sizes.staged, images * (l == kDense ? layer.small_size() : layer.large_size()));
    }
    buffers_ = TeamBuffers<T>(sizes, x.threads, arena_);
  }

  int64_t bytes() const { return arena_.used(); }

  void run() const {
    run_team(x_.threads, [&](const Team& team) {
      const ThreadBuffers<T> own = buffers_.of(team.rank);
      pack_scatter<T>(layer(kDense), weight_of<T>(x_, kDense), team, own.pack_rows, packed_[kDense]);
      for (int l = kFirst; l < kLayers; ++l) {
        pack_gather<T>(layer(l), weight_of<T>(x_, l), team, own.pack_rows, packed_[l]);
      }
      team.barrier();
      for (int64_t first = 0; first < x_.images; first += block_) {
        const int64_t left = x_.images - first, count = left < block_ ? left : block_;
        for (int l = kLast; l >= kSecond; --l) step(l, first, count, team, own);
      }
      step(kFirst, 0, x_.images, team, own);
      step(kDense, 0, x_.images, team, own);
      for (int l = 0; l < kLayers; ++l) finish_layer(l, team);
    });
  }

 private:
  LayerGradient<T> gradient(int l) { return LayerGradient<T>(layer_of(x_, l), block_, x_.layers[l], arena_); }
  const Layer& layer(int l) const { return gradients_[l].plan.layer; }

  // Of the pixels that layer l computes.
  int64_t sums_size(int l) const { return l == kDense ? layer(l).small_size() : layer(l).large_size(); }
  int64_t bias_size(int l) const {
    if (l == kFirst) return layer(l).large_channels / kFirstPixels;
    return l == kDense ? layer(l).small_channels : layer(l).large_channels;
  }

  // The gradient of layer l's sums, of images from `first` on; the first layer's as [channels, pixels].
  T* sums_grad(int l, int64_t first) const {
    if (l == kLast) return const_cast<T*>(static_cast<const T*>(x_.grad)) + first * sums_size(l);
    return between_[l] + (l < kSecond ? first * sums_size(l) : 0);
  }
  const T* output(int l, int64_t first) const { return static_cast<const T*>(x_.outputs[l]) + first * sums_size(l); }

  // Layer l of some images: the gradients of its parameters and of what it reads.
  void step(int l, int64_t first, int64_t count, const Team& team, const ThreadBuffers<T>& own) const {
    const auto slot = [&](int rank) { return buffers_.of(rank).slot; };
    const GradientBuffer<decltype(slot)> buffer{slot, own.small_at, own.large_at};
    const T* sums = sums_grad(l, first);
    const T* small = l == kDense ? sums : output(l - 1, first);
    const T* large = l == kDense ? static_cast<const T*>(x_.feat) + first * x_.features : sums;
    add_gradient<T>(gradients_[l].plan, small, large, count, first > 0, team, buffer, gradients_[l].sums);
    sum_bias(l, sums, first, count, team);
    const int64_t group = group_of(count, team.size, wanted_images(layer(l)));
    const Range groups = share((count + group - 1) / group, team);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const int64_t from = g * group, images = count - from < group ? count - from : group;
      if (l == kDense) {
        to_features(from, images, own);
      } else {
        below(l, first + from, images, sums + from * sums_size(l), sums_grad(l - 1, first) + from * sums_size(l - 1),
              own);
      }
    }
    team.barrier();
  }

  void sum_bias(int l, const T* sums, int64_t first, int64_t count, const Team& team) const {
    if (l == kLast) {  // a line's channels side by side: a vector of three would be mostly empty
      const int64_t columns = kImageSide * x_.channels;
      sum_rows(sums, count, kImageSide, columns, team, partial_[l] + first * columns);
    } else if (l == kFirst) {
      const Range own = share(count, team);
      for (int64_t n = own.begin; n < own.end; ++n) {
        for (int64_t c = 0; c < bias_size(l); ++c) {
          Wide<T> sum = 0;
          const T* from = sums + n * sums_size(l) + c * kFirstPixels;
          for (int64_t pixel = 0; pixel < kFirstPixels; ++pixel) sum += widen(from[pixel]);
          partial_[l][(first + n) * bias_size(l) + c] = sum;
        }
      }
    } else {
      const int64_t columns = bias_size(l);
      sum_rows(sums, count, sums_size(l) / columns, columns, team, partial_[l] + first * columns);
    }
  }

  // From the gradient of layer l's sums to that of the layer below, through its ELU; the dense layer has none.
  void below(int l, int64_t first, int64_t images, const T* sums, T* to, const ThreadBuffers<T>& own) const {
    const Layer& of = layer(l);
    const T* y = output(l - 1, first);
    const int64_t channels = of.small_channels;
    gather<T>(of, images, operands_of<T>(sums, images * of.large_size(), own.staged), packed_[l], own.gather,
              [&](int64_t pixel, int64_t column, int64_t count, const Wide<T>* x) {
                const int64_t at = pixel * channels + column;
                if (l == kFirst) return copy_to(x, count, to + at);
                if (l != kSecond) return through_elu(x, y + at, count, to + at);
                T grad[kSumVectors * kLanes<T>];
                through_elu(x, y + at, count, grad);
                const int64_t n = pixel / kFirstPixels, turned = n * kFirstPixels * channels + pixel % kFirstPixels;
                for (int64_t c = 0; c < count; ++c) to[turned + (column + c) * kFirstPixels] = grad[c];
              });
  }

  void to_features(int64_t first, int64_t images, const ThreadBuffers<T>& own) const {
    const Layer& of = layer(kDense);
    auto* to = static_cast<Wide<T>*>(x_.feat_grad) + first * of.large_channels;
    const T* sums = sums_grad(kDense, first);
    scatter<T>(of, images, operands_of<T>(sums, images * of.small_size(), own.staged), packed_[kDense], own.scatter,
               [&](int64_t n, const Wide<T>* x) { copy_to(x, of.large_channels, to + n * of.large_channels); });
  }

  void finish_layer(int l, const Team& team) const {
    gradients_[l].unpack(team);
    if (l % team.size != team.rank) return;
    const int64_t columns = l == kLast ? kImageSide * x_.channels : bias_size(l);
    sum_images(partial_[l], x_.images, columns, bias_size(l), static_cast<Wide<T>*>(x_.layers[l].bias_grad));
  }

  const DecoderArguments& x_;
  Arena arena_;
  int64_t block_;
  LayerGradient<T> gradients_[kLayers];
  Element<T>* packed_[kLayers];
  T* between_[kLayers];        // gradients of the layers' sums: of all images for the first two, else of a block
  Wide<T>* partial_[kLayers];  // sums of those over an image
  TeamBuffers<T> buffers_;
};

}  // namespace

const ByDtype<ImageModel<DecoderArguments>> decoder = models<Forward, Backward, DecoderArguments>();

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
