// What the encoder's and the decoder's passes share.
#pragma once

#include "../parts/math.h"
#include "conv_gradient.h"
#include "image_model.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

constexpr int64_t kImageSide = 64;

// to[c] = f(sums[c] + bias[c]) for n values; X is T, or Real where the result stays wide.
template <bool Elu, class X, class Real>
inline void finish(const Real* sums, const Real* bias, int64_t n, X* to) {
  each_vector<Real>(n, [&](int64_t c, int64_t count) {
    const Vector<Real> x = load(sums + c) + load_some(bias + c, count);
    if constexpr (Elu) {
      store_some(to + c, elu(x), count);
    } else {
      store_some(to + c, x, count);
    }
  });
}

// to[c] = x[c]·(derivative of ELU where its result is y[c]). `x` may end with the last value.
template <class X, class Y, class From>
inline void through_elu(const From* x, const Y* y, int64_t n, X* to) {
  each_vector<Y>(n, [&](int64_t c, int64_t count) {
    store_some(to + c, load_some(x + c, count) * elu_grad(load_some(y + c, count)), count);
  });
}

// Values of T as products read them: in place, or copied to `staged`.
template <class T>
inline const Element<T>* operands_of(const T* from, int64_t n, Element<T>* staged) {
  if constexpr (kReadsInPlace<T>) {
    return from;
  } else {
    to_operands<T>(from, n, staged);
    return staged;
  }
}

// Pixels as a product's rows: in place, or copied to `staged`, [pixels, padded(channels)].
template <class T>
inline const Element<T>* stage_pixels(const T* from, int64_t pixels, int64_t channels, Element<T>* staged) {
  if (padded<T>(channels) == channels) return operands_of<T>(from, pixels * channels, staged);
  for (int64_t p = 0; p < pixels; ++p) to_operands<T>(from + p * channels, channels, staged + p * padded<T>(channels));
  return staged;
}

template <class X, class Real>
inline void copy_to(const Real* from, int64_t n, X* to) {
  each_vector<Real>(n, [&](int64_t c, int64_t count) { store_some(to + c, load_some(from + c, count), count); });
}

// A thread's working memory, enough for each of several layers: grown by grow_…, then made for every thread.
template <class T>
struct ThreadMemory {
  int64_t pack_rows = 0, units = 0, slot = 0, images = 0, staged = 0;
  int64_t sums = 0, rows = 0;

  void grow_pack(const Layer& layer) { grow(pack_rows, pack_scratch<T>(layer)); }
  void grow_gradient(const GradientPlan<T>& plan) {
    grow(units, plan.units);
    if (plan.staged) grow(slot, plan.small_slot + plan.large_slot);
  }
  void grow_scatter(const Layer& layer, int64_t group) {
    grow(sums, group * layer.large_pixels() * scatter_stride<T>(layer));
    grow(rows, group * layer.small_pixels());
  }
  static void grow(int64_t& size, int64_t wanted) { size = size > wanted ? size : wanted; }
};

// The arrays of which ThreadMemory has the sizes.
template <class T>
struct ThreadBuffers {
  Wide<T>* pack_rows;
  T* images;                  // converted ones
  Element<T>*staged, *slot;   // operands: of a product, of a group of a gradient
  int64_t *small_at, *large_at;
  GatherBuffer<T> gather;
  ScatterBuffer<T> scatter;

  ThreadBuffers(const ThreadMemory<T>& sizes, Arena& arena)
      : pack_rows(arena.take<Wide<T>>(sizes.pack_rows)),
        images(arena.take<T>(sizes.images)),
        staged(arena.take<Element<T>>(sizes.staged)),
        slot(arena.take<Element<T>>(sizes.slot)),
        small_at(arena.take<int64_t>(sizes.units)),
        large_at(arena.take<int64_t>(sizes.units)),
        gather(arena),
        scatter{arena.take<Wide<T>>(sizes.sums), arena.take<const Element<T>*>(sizes.rows),
                arena.take<Wide<T>*>(sizes.rows)} {}
};

// The buffers of all threads, one behind the other.
template <class T>
class TeamBuffers {
 public:
  TeamBuffers() = default;
  TeamBuffers(const ThreadMemory<T>& sizes, int threads, Arena& arena) : sizes_(sizes) {
    Arena counting(nullptr);
    static_cast<void>(ThreadBuffers<T>(sizes, counting));
    bytes_ = counting.used();
    memory_ = arena.take<char>(bytes_ * threads);
  }
  ThreadBuffers<T> of(int rank) const {
    Arena arena(memory_ + bytes_ * rank);
    return ThreadBuffers<T>(sizes_, arena);
  }

 private:
  ThreadMemory<T> sizes_;
  int64_t bytes_ = 0;
  char* memory_ = nullptr;
};

// The working memory of a layer's gradient, apart from the slots.
template <class T>
struct LayerGradient {
  GradientPlan<T> plan;
  const LayerParameters* parameters;
  Wide<T>* sums;

  // `images`: of a call of add_gradient, at most.
  LayerGradient(const Layer& layer, int64_t images, const LayerParameters& to, Arena& arena)
      : plan(layer),
        parameters(&to),
        sums(plan.in_place() ? static_cast<Wide<T>*>(to.weight_grad) : arena.take<Wide<T>>(plan.memory(images))) {}

  void unpack(const Team& team) const {
    if (!plan.in_place()) unpack_gradient(plan, sums, team, static_cast<Wide<T>*>(parameters->weight_grad));
  }
};

// The functions of a pass that a class Pass<T>(arguments, memory) describes: bytes() of memory, and run().
template <class P, class Arguments>
int64_t bytes_of(const Arguments& x) {
  return P(x, nullptr).bytes();
}

template <class P, class Arguments>
void run_pass(const Arguments& x, void* memory) {
  P(x, memory).run();
}

template <template <class> class Forward, template <class> class Backward, class T, class Arguments>
constexpr ImageModel<Arguments> model() {
  return {{bytes_of<Forward<T>, Arguments>, run_pass<Forward<T>, Arguments>},
          {bytes_of<Backward<T>, Arguments>, run_pass<Backward<T>, Arguments>}};
}

template <template <class> class Forward, template <class> class Backward, class Arguments>
constexpr ByDtype<ImageModel<Arguments>> models() {
  return {model<Forward, Backward, float, Arguments>(), model<Forward, Backward, double, Arguments>(),
          model<Forward, Backward, Bf16, Arguments>()};
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
