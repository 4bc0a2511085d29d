// Images of bytes u, with x = u/255 - ½, one pass over them:
//
//     loss = ½·Σ (mean - x)² / images + constant,   dmean = scale·(mean - x);   or x itself
//
// The squares of a block are added up in vectors of its own, the blocks in one order.

#include "image_loss.h"

#include "../parts/simd.h"
#include "../parts/team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// What the model sees of a vector of bytes, divided and subtracted as PyTorch does.
template <class Real>
inline Vector<Real> pixels(const uint8_t* from) {
  using Bytes __attribute__((vector_size(kWidth<Real>))) = uint8_t;
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Vector<Real>) / Real(255) - Real(0.5);
}

template <class Real>
inline Vector<Real> pixels(const uint8_t* from, int64_t count) {
  uint8_t padded[kWidth<Real>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return pixels<Real>(padded);
}

// The block's gradient, if wanted, and the sum of its squares.
template <class T>
double block_of_loss(const ImageProblem& p, int64_t begin, int64_t end) noexcept {
  using Real = Wide<T>;
  constexpr int64_t width = kWidth<Real>;
  const T* mean = static_cast<const T*>(p.mean);
  T* out = static_cast<T*>(p.out);
  const Real scale = Real(p.scale);
  Vector<Real> squares[2] = {};
  int64_t i = begin;
  for (; i + width <= end; i += width) {
    const Vector<Real> difference = load(mean + i) - pixels<Real>(p.image + i);
    squares[i / width % 2] += difference * difference;
    if (out != nullptr) store(out + i, scale * difference);
  }
  double total = double(sum(squares[0] + squares[1]));
  for (; i < end; ++i) {
    const Real difference = widen(mean[i]) - pixels<Real>(p.image + i, 1)[0];
    total += double(difference) * double(difference);
    if (out != nullptr) out[i] = narrow<T>(scale * difference);
  }
  return total;
}

// The blocks among all threads; work(number, begin, end).
template <class Work>
void for_each_block(const ImageProblem& p, const Team& team, const Work& work) {
  const Range blocks = share((p.count + kImageBlock - 1) / kImageBlock, team);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t begin = block * kImageBlock, end = begin + kImageBlock;
    work(block, begin, end < p.count ? end : p.count);
  }
}

template <class T>
void loss(const ImageProblem& p) {
  run_team(p.threads, [&](const Team& team) {
    for_each_block(p, team, [&](int64_t block, int64_t begin, int64_t end) {
      p.partial[block] = block_of_loss<T>(p, begin, end);
    });
    team.barrier();
    if (team.rank != 0 || p.loss == nullptr) return;
    double total = 0;
    for (int64_t block = 0; block * kImageBlock < p.count; ++block) total += p.partial[block];
    *static_cast<Wide<T>*>(p.loss) = Wide<T>(0.5 * total / double(p.images) + p.constant);
  });
}

template <class T>
void normalize(const ImageProblem& p) {
  using Real = Wide<T>;
  constexpr int64_t width = kWidth<Real>;
  T* out = static_cast<T*>(p.out);
  run_team(p.threads, [&](const Team& team) {
    for_each_block(p, team, [&](int64_t, int64_t begin, int64_t end) {
      int64_t i = begin;
      for (; i + width <= end; i += width) store(out + i, pixels<Real>(p.image + i));
      if (i < end) store(out + i, pixels<Real>(p.image + i, end - i), end - i);
    });
  });
}

}  // namespace

const ByDtype<Function<ImageProblem>> image_loss = {loss<float>, loss<double>, loss<Bf16>};
const ByDtype<Function<ImageProblem>> normalize_image = {normalize<float>, normalize<double>, normalize<Bf16>};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
