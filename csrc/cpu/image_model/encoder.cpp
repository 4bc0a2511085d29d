// The encoder: four convolutions with kernel 4 and stride 2, ELU after each.
//
// Forward, a thread takes a group of images through one layer, a barrier a layer. Backward, a block of images goes through
// all layers, so that the gradients between them stay in the cache and take little memory.

#include "passes.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

constexpr int kLayers = 4;
constexpr int64_t kBlock = 64;  // images

Layer layer_of(const EncoderArguments& x, int l) {
  int64_t side = kImageSide;
  for (int i = 0; i < l; ++i) side = (side - 4) / 2 + 1;
  return {(side - 4) / 2 + 1, x.depth << l, side, l == 0 ? x.channels : x.depth << (l - 1), 4};
}

// to[i] = from[i] / 255 - 1/2, rounded to T once.
template <class T>
void normalize(const uint8_t* from, int64_t n, T* to) {
  using Bytes __attribute__((vector_size(kLanes<T>))) = uint8_t;
  each_vector<T>(n, [&](int64_t i, int64_t count) {
    uint8_t lanes[kLanes<T>] = {};
    for (int64_t j = 0; j < count; ++j) lanes[j] = from[i + j];
    Bytes bytes;
    __builtin_memcpy(&bytes, lanes, sizeof bytes);
    store_some(to + i, __builtin_convertvector(bytes, Vector<Wide<T>>) / 255 - Wide<T>(0.5), count);
  });
}

// Images [first, first + count) in T: where they are, or in `memory`.
template <class T>
const T* images_of(const EncoderArguments& x, int64_t first, int64_t count, T* memory) {
  const int64_t size = kImageSide * kImageSide * x.channels;
  if (!x.bytes) return static_cast<const T*>(x.image) + first * size;
  normalize(static_cast<const uint8_t*>(x.image) + first * size, count * size, memory);
  return memory;
}

template <class T>
class Forward {
 public:
  Forward(const EncoderArguments& x, void* memory) : x_(x), arena_(memory) {
    ThreadMemory<T> sizes;
    for (int l = 0; l < kLayers; ++l) {
      layers_[l] = layer_of(x, l);
      groups_[l] = group_of(x.images, x.threads, wanted_images(layers_[l]));
      packed_[l] = arena_.take<Element<T>>(packed_gather_size<T>(layers_[l]));
      sizes.grow_pack(layers_[l]);
      const int64_t size = groups_[l] * layers_[l].large_size();
      if (!kReadsInPlace<T>) sizes.grow(sizes.staged, size);
      if (x.bytes && l == 0) sizes.grow(sizes.images, size);
    }
    buffers_ = TeamBuffers<T>(sizes, x.threads, arena_);
  }

  int64_t bytes() const { return arena_.used(); }

  void run() const {
    run_team(x_.threads, [&](const Team& team) {
      const ThreadBuffers<T> own = buffers_.of(team.rank);
      for (int l = 0; l < kLayers; ++l) {
        pack_gather<T>(layers_[l], static_cast<const Wide<T>*>(x_.layers[l].weight), team, own.pack_rows, packed_[l]);
      }
      for (int l = 0; l < kLayers; ++l) {
        team.barrier();
        const Range groups = share((x_.images + groups_[l] - 1) / groups_[l], team);
        for (int64_t g = groups.begin; g < groups.end; ++g) {
          const int64_t first = g * groups_[l], left = x_.images - first;
          layer(l, first, left < groups_[l] ? left : groups_[l], own);
        }
      }
    });
  }

 private:
  // Layer l of images [first, first + count).
  void layer(int l, int64_t first, int64_t count, const ThreadBuffers<T>& own) const {
    const Layer& layer = layers_[l];
    const T* large = l == 0 ? images_of<T>(x_, first, count, own.images)
                            : static_cast<const T*>(x_.outputs[l - 1]) + first * layer.large_size();
    const auto* bias = static_cast<const Wide<T>*>(x_.layers[l].bias);
    const auto into = [&](auto* out) {
      out += first * layer.small_size();
      gather<T>(layer, count, operands_of<T>(large, count * layer.large_size(), own.staged), packed_[l], own.gather,
                [&](int64_t pixel, int64_t column, int64_t n, const Wide<T>* sums) {
                  finish<true>(sums, bias + column, n, out + pixel * layer.small_channels + column);
                });
    };
    if (l == kLayers - 1) {
      into(static_cast<Wide<T>*>(x_.outputs[l]));
    } else {
      into(static_cast<T*>(x_.outputs[l]));
    }
  }

  const EncoderArguments& x_;
  Arena arena_;
  Layer layers_[kLayers];
  int64_t groups_[kLayers];
  Element<T>* packed_[kLayers];
  TeamBuffers<T> buffers_;
};

template <class T>
class Backward {
 public:
  Backward(const EncoderArguments& x, void* memory)
      : x_(x), arena_(memory), block_(x.images < kBlock ? x.images : kBlock),
        gradients_{gradient(0), gradient(1), gradient(2), gradient(3)} {
    ThreadMemory<T> sizes;
    for (int l = 0; l < kLayers; ++l) {
      const Layer& layer = gradients_[l].plan.layer;
      sizes.grow_gradient(gradients_[l].plan);
      between_[l] = arena_.take<T>((l == kLayers - 1 ? x.images : block_) * layer.small_size());
      partial_[l] = arena_.take<Wide<T>>(x.images * layer.small_channels);
      if (!scatters(l)) continue;
      packed_[l] = arena_.take<Element<T>>(packed_scatter_size<T>(layer));
      sizes.grow_pack(layer);
      sizes.grow_scatter(layer, wanted_images(layer));
      sizes.grow(sizes.staged, wanted_images(layer) * layer.small_pixels() * padded<T>(layer.small_channels));
    }
    converted_ = x.bytes ? arena_.take<T>(block_ * gradients_[0].plan.layer.large_size()) : nullptr;
    buffers_ = TeamBuffers<T>(sizes, x.threads, arena_);
  }

  int64_t bytes() const { return arena_.used(); }

  void run() const {
    run_team(x_.threads, [&](const Team& team) {
      const ThreadBuffers<T> own = buffers_.of(team.rank);
      for (int l = 0; l < kLayers; ++l) {
        const auto* weight = static_cast<const Wide<T>*>(x_.layers[l].weight);
        if (scatters(l)) pack_scatter<T>(gradients_[l].plan.layer, weight, team, own.pack_rows, packed_[l]);
      }
      begin(team);
      team.barrier();
      for (int64_t first = 0; first < x_.images; first += block_) {
        const int64_t left = x_.images - first;
        block(first, left < block_ ? left : block_, team, own);
      }
      for (int l = 0; l < kLayers; ++l) {
        gradients_[l].unpack(team);
        if (l % team.size != team.rank) continue;
        const int64_t channels = gradients_[l].plan.layer.small_channels;
        sum_images(partial_[l], x_.images, channels, channels, static_cast<Wide<T>*>(x_.layers[l].bias_grad));
      }
    });
  }

 private:
  LayerGradient<T> gradient(int l) { return LayerGradient<T>(layer_of(x_, l), block_, x_.layers[l], arena_); }
  bool scatters(int l) const { return l > 0 || x_.image_grad != nullptr; }

  // The gradient of the last layer's sums.
  void begin(const Team& team) const {
    const Range own = share(x_.images * gradients_[kLayers - 1].plan.layer.small_size(), team);
    const auto at = [&](const void* data) { return static_cast<const Wide<T>*>(data) + own.begin; };
    through_elu(at(x_.grad), at(x_.outputs[kLayers - 1]), own.end - own.begin, between_[kLayers - 1] + own.begin);
  }

  void block(int64_t first, int64_t count, const Team& team, const ThreadBuffers<T>& own) const {
    const auto slot = [&](int rank) { return buffers_.of(rank).slot; };
    const GradientBuffer<decltype(slot)> buffer{slot, own.small_at, own.large_at};
    if (x_.bytes) {
      const int64_t size = gradients_[0].plan.layer.large_size();
      const Range mine = share(count, team);
      images_of(x_, first + mine.begin, mine.end - mine.begin, converted_ + mine.begin * size);
    }
    for (int l = kLayers - 1; l >= 0; --l) {
      const Layer& layer = gradients_[l].plan.layer;
      const T* small = between_[l] + (l == kLayers - 1 ? first * layer.small_size() : 0);
      const T* large = l == 0 && x_.bytes ? converted_
                                          : static_cast<const T*>(l == 0 ? x_.image : x_.outputs[l - 1]) +
                                                first * layer.large_size();
      add_gradient<T>(gradients_[l].plan, small, large, count, first > 0, team, buffer, gradients_[l].sums);
      sum_rows(small, count, layer.small_pixels(), layer.small_channels, team,
               partial_[l] + first * layer.small_channels);
      if (scatters(l)) below(l, first, count, small, team, own);
      team.barrier();
    }
  }

  // The gradient of what layer l reads: through the ELU before it, or that of the images.
  void below(int l, int64_t first, int64_t count, const T* small, const Team& team, const ThreadBuffers<T>& own) const {
    const Layer& layer = gradients_[l].plan.layer;
    const int64_t group = group_of(count, team.size, wanted_images(layer)), channels = layer.large_channels;
    const Range groups = share((count + group - 1) / group, team);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const int64_t from = g * group, images = count - from < group ? count - from : group;
      const Element<T>* a = stage_pixels<T>(small + from * layer.small_size(), images * layer.small_pixels(),
                                            layer.small_channels, own.staged);
      const int64_t offset = from * layer.large_size(), whole = offset + first * layer.large_size();
      scatter<T>(layer, images, a, packed_[l], own.scatter, [&](int64_t pixel, const Wide<T>* sums) {
        const int64_t at = pixel * channels;
        if (l == 0) {
          copy_to(sums, channels, static_cast<T*>(x_.image_grad) + whole + at);
        } else {
          through_elu(sums, static_cast<const T*>(x_.outputs[l - 1]) + whole + at, channels,
                      between_[l - 1] + offset + at);
        }
      });
    }
  }

  const EncoderArguments& x_;
  Arena arena_;
  int64_t block_;
  LayerGradient<T> gradients_[kLayers];
  T* between_[kLayers];          // gradients of the layers' sums: of all images for the last, else of a block
  Wide<T>* partial_[kLayers];    // sums of those over an image's pixels
  Element<T>* packed_[kLayers];
  T* converted_;                 // a block of images
  TeamBuffers<T> buffers_;
};

}  // namespace

const ByDtype<ImageModel<EncoderArguments>> encoder = models<Forward, Backward, EncoderArguments>();

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
