// Rows of grad are added to the rows of outᵀ that the latents chose, S of them instead of S·C. A thread does so for some
// vectors of columns at a time, whose sums stay in the second-level cache, and turns them when it is done.

#include "onehot.h"

#include "product.h"
#include "team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

constexpr int64_t kWidest = kWidth<float>;
constexpr int64_t kBlock = 128;       // columns at a time
constexpr int32_t kTogether = 64;     // terms summed before they join the total

int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
struct Gradient {
  const OneHotGradient& x;
  int64_t latents, rows;
  int32_t* chosen;  // [B·T, S], numbers of outᵀ's rows

  explicit Gradient(const OneHotGradient& x)
      : x(x), latents(x.groups * x.classes), rows(x.batch * x.length), chosen() {}

  int64_t chosen_bytes() const { return up(rows * x.groups * int64_t(sizeof(int32_t))); }
  int64_t sums_bytes() const { return up((latents + kWidest) * kBlock * int64_t(sizeof(float))); }
  int64_t counts_bytes() const { return up(latents * int64_t(sizeof(int32_t))); }
  int64_t thread_bytes() const { return 2 * sums_bytes() + counts_bytes(); }

  // Of the numbers at `from`, one of which is not zero, that one.
  int32_t find(const float* from) const {
    int64_t c = 0;
    for (uint64_t two; c + 2 <= x.classes; c += 2) {
      __builtin_memcpy(&two, from + c, sizeof two);
      if (two != 0) break;
    }
    return int32_t(c + 1 < x.classes && from[c] == 0 ? c + 1 : c < x.classes ? c : c - 1);
  }

  void find_all(const Team& team) const {
    const Range mine = share(rows, team);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      if (r % x.length == 0 || x.first[r]) continue;
      const float* before = x.stoch + (r - 1) * latents;
      for (int64_t s = 0; s < x.groups; ++s) {
        chosen[r * x.groups + s] = int32_t(s * x.classes) + find(before + s * x.classes);
      }
    }
  }

  // Sums of `vectors` vectors of columns: the latest terms, the total, and how many the latest are.
  struct Sums {
    float *latest, *total;
    int32_t* count;
    int64_t vectors;

    void add(int64_t l, const Floats* grad, float weight) const {
      float* sums = latest + l * kBlock;
      for (int64_t v = 0; v < vectors; ++v) store(sums + v * kWidest, load(sums + v * kWidest) + weight * grad[v]);
      if (++count[l] % kTogether != 0) return;
      float* all = total + l * kBlock;
      for (int64_t v = 0; v < vectors; ++v) {
        store(all + v * kWidest, load(all + v * kWidest) + load(sums + v * kWidest));
        store(sums + v * kWidest, Floats{});
      }
    }
  };

  void add_row(int64_t r, const Floats* grad, const Sums& sums) const {
    if (r % x.length != 0) {
      for (int64_t s = 0; s < x.groups; ++s) sums.add(chosen[r * x.groups + s], grad, 1);
      return;
    }
    const float* start = x.start + r / x.length * latents;
    for (int64_t l = 0; l < latents; ++l) {
      if (start[l] != 0) sums.add(l, grad, start[l]);
    }
  }

  // Columns [begin, end), at most kBlock.
  void columns(int64_t begin, int64_t end, char* memory) const {
    float* latest = reinterpret_cast<float*>(memory);
    float* total = reinterpret_cast<float*>(memory + sums_bytes());
    const Sums sums{latest, total, reinterpret_cast<int32_t*>(memory + 2 * sums_bytes()),
                    panels(end - begin, kWidest)};
    __builtin_memset(memory, 0, thread_bytes());
    for (int64_t r = 0; r < rows; ++r) {
      if (x.first[r]) continue;
      const T* row = static_cast<const T*>(x.grad) + r * x.hidden;
      Floats grad[kBlock / kWidest];
      for (int64_t v = 0; v < sums.vectors; ++v) {
        const int64_t h = begin + v * kWidest;
        grad[v] = end - h >= kWidest ? load(row + h) : load(row + h, end - h);
      }
      add_row(r, grad, sums);
    }
    for (int64_t l = 0; l < latents; l += kWidest) {
      for (int64_t h = begin; h < end; h += kWidest) write_square(sums, l, h, h - begin, end);
    }
  }

  void write_square(const Sums& sums, int64_t l, int64_t h, int64_t at, int64_t end) const {
    Floats square[kWidest];
    for (int64_t i = 0; i < kWidest; ++i) {
      const int64_t from = (l + i) * kBlock + at;
      square[i] = load(sums.total + from) + load(sums.latest + from);
    }
    transpose(square);
    const int64_t left = latents - l;
    for (int64_t i = 0; i < kWidest && h + i < end; ++i) {
      T* to = static_cast<T*>(x.out) + (h + i) * x.out_stride + l;
      left >= kWidest ? store(to, square[i]) : store(to, square[i], left);
    }
  }
};

template <class T>
int64_t workspace(const OneHotGradient& x) {
  const Gradient<T> gradient(x);
  return gradient.chosen_bytes() + x.threads * gradient.thread_bytes();
}

template <class T>
void run(const OneHotGradient& x, void* memory) {
  Gradient<T> gradient(x);
  gradient.chosen = static_cast<int32_t*>(memory);
  char* behind = static_cast<char*>(memory) + gradient.chosen_bytes();
  run_team(x.threads, [&](const Team& team) {
    gradient.find_all(team);
    team.barrier();
    const Range own = share(panels(x.hidden, kWidest), team);
    const int64_t last = own.end * kWidest < x.hidden ? own.end * kWidest : x.hidden;
    for (int64_t h = own.begin * kWidest; h < last; h += kBlock) {
      gradient.columns(h, last - h < kBlock ? last : h + kBlock, behind + team.rank * gradient.thread_bytes());
    }
  });
}

}  // namespace

const ByDtype<Pass<OneHotGradient>> onehot_gradient = {
    {workspace<float>, run<float>}, {nullptr, nullptr}, {workspace<Bf16>, run<Bf16>}};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
