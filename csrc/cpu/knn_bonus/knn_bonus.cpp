// Threads, memory and selection around the inner loop in panel.cpp.
//
// Queries are dealt out in groups of panels. A group walks over all keys once, a block at a time: the block (12 KB) and one
// panel (24 KB at d = 128) share the first-level cache. There is no [Q, N] matrix and no packed copy of the keys.

#include "knn_bonus.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../parts/bf16.h"
#include "../parts/threads.h"
#include "panel.h"

namespace apv_fast {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kGroupBytes = 512 * 1024;  // of panels in one group: they stay in the second-level cache
constexpr size_t kBlockBytes = 12 * 1024;   // of keys in one block
constexpr int64_t kGroupsPerThread = 4;     // to even out the load

struct Float16 {
  uint16_t bits;
};

template <class To, class From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(Bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
inline float widen(Float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  // The exponent's bias is 15 in half and 127 in single precision; the product is exact, subnormal numbers included.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // infinity and NaN
  return bit_cast<float>(bits | uint32_t(value.bits & 0x8000) << 16);
}

template <class Real>
const Search<Real>& search_for(Isa isa) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    return APV_FAST_PICK(isa, search_float);
  } else {
    return APV_FAST_PICK(isa, search_double);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is cut up, and the memory that one thread needs for it.
template <class Real>
struct Plan {
  int64_t lanes, d, k, capacity;
  int64_t panels;  // in a group
  int64_t block;   // keys in a block
  int64_t groups;
  int threads;

  Plan(int64_t lanes, int64_t q, int64_t n, int64_t d, const KnnOptions& options) : lanes(lanes), d(d) {
    k = std::min(options.k, n);
    capacity = std::min(std::max(3 * k, k + kMaxKeys), n + 1);
    threads = usable_threads(options.threads);
    const int64_t all = ceil_div(q, lanes);
    const int64_t fit = int64_t(kGroupBytes / panel_bytes());
    panels = std::max<int64_t>(std::min(ceil_div(all, kGroupsPerThread * threads), fit), 1);
    groups = ceil_div(all, panels);
    threads = int(std::min<int64_t>(threads, groups));
    block = std::clamp<int64_t>(kBlockBytes / (sizeof(Real) * std::max<int64_t>(d, 1)), 4, kMaxKeys) / 4 * 4;
  }

  static size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
  size_t query_bytes() const { return aligned(sizeof(Real) * d * lanes); }
  size_t limit_bytes() const { return aligned(sizeof(Real) * lanes); }
  size_t nearest_bytes() const { return aligned(sizeof(Real) * lanes * capacity); }
  size_t count_bytes() const { return aligned(sizeof(int64_t) * lanes); }
  size_t panel_bytes() const { return query_bytes() + limit_bytes() + nearest_bytes() + count_bytes(); }
  size_t thread_bytes() const { return aligned(sizeof(Real) * block * d) + panels * panel_bytes(); }
};

// One thread's share of the working memory.
template <class Real>
struct Workspace {
  Real* keys;  // [block, d], for keys that must be widened or gathered
  std::vector<Panel<Real>> panels;

  Workspace(const Plan<Real>& plan, std::byte* memory) {
    const auto take = [&memory](size_t bytes) {
      std::byte* begin = memory;
      memory += bytes;
      return static_cast<void*>(begin);
    };
    keys = static_cast<Real*>(take(Plan<Real>::aligned(sizeof(Real) * plan.block * plan.d)));
    panels.resize(plan.panels);
    for (Panel<Real>& panel : panels) {
      panel.query = static_cast<Real*>(take(plan.query_bytes()));
      panel.limit = static_cast<Real*>(take(plan.limit_bytes()));
      panel.nearest = static_cast<Real*>(take(plan.nearest_bytes()));
      panel.count = static_cast<int64_t*>(take(plan.count_bytes()));
      panel.capacity = plan.capacity;
      panel.k = plan.k;
    }
  }
};

// Fills a panel with the queries from `first` on; lanes past the last one get a limit that no distance meets.
template <class Source, class Real>
void load_panel(const Matrix& query, int64_t first, const Plan<Real>& plan, Panel<Real>& panel) {
  for (int64_t lane = 0; lane < plan.lanes; ++lane) {
    const int64_t row = first + lane;
    const bool used = row < query.rows;
    panel.count[lane] = 0;
    panel.limit[lane] = used ? std::numeric_limits<Real>::infinity() : Real(-1);
    const Source* source = static_cast<const Source*>(query.data) + (used ? row * query.row_stride : 0);
    for (int64_t c = 0; c < plan.d; ++c) {
      panel.query[c * plan.lanes + lane] = used ? widen(source[c * query.column_stride]) : Real(0);
    }
  }
}

// Rows of `keys` from `first` on as dense rows of Real: where they lie if they are that already, else in `buffer`.
template <class Source, class Real>
const Real* load_keys(const Matrix& keys, int64_t first, int64_t n, Real* buffer, int64_t& stride) {
  const Source* source = static_cast<const Source*>(keys.data) + first * keys.row_stride;
  if constexpr (std::is_same_v<Source, Real>) {
    if (keys.column_stride == 1) {
      stride = keys.row_stride;
      return source;
    }
  }
  stride = keys.columns;
  for (int64_t i = 0; i < n; ++i, source += keys.row_stride) {
    Real* row = buffer + i * stride;
    if (keys.column_stride == 1) {  // a loop of its own, which compilers vectorise
      for (int64_t c = 0; c < stride; ++c) row[c] = widen(source[c]);
    } else {
      for (int64_t c = 0; c < stride; ++c) row[c] = widen(source[c * keys.column_stride]);
    }
  }
  return buffer;
}

// The bonus of one lane: its list holds all distances that are not NaN, or at least the k smallest of them.
template <class Real>
Real reduce(Panel<Real>& panel, int64_t lane, bool mean) {
  if (panel.count[lane] < panel.k) return std::numeric_limits<Real>::quiet_NaN();
  tighten(panel, lane);
  const Real* nearest = panel.nearest + lane * panel.capacity;
  if (!mean) return std::sqrt(*std::max_element(nearest, nearest + panel.k));
  std::conditional_t<sizeof(Real) == 4, double, long double> sum = 0;
  for (int64_t i = 0; i < panel.k; ++i) sum += std::sqrt(nearest[i]);
  return Real(sum / panel.k);
}

template <class Source, class Real>
void run_group(const Matrix& query, const Matrix& keys, const KnnOptions& options, const Plan<Real>& plan,
               const Search<Real>& isa, int64_t group, Workspace<Real>& workspace, Real* out) {
  const int64_t first = group * plan.panels * plan.lanes;
  const int64_t panels = std::min(plan.panels, ceil_div(query.rows - first, plan.lanes));
  for (int64_t p = 0; p < panels; ++p) {
    load_panel<Source>(query, first + p * plan.lanes, plan, workspace.panels[p]);
  }
  for (int64_t key = 0; key < keys.rows; key += plan.block) {
    const int64_t n = std::min(plan.block, keys.rows - key);
    int64_t stride;
    const Real* block = load_keys<Source>(keys, key, n, workspace.keys, stride);
    for (int64_t p = 0; p < panels; ++p) isa.search(block, stride, n, plan.d, workspace.panels[p]);
  }
  for (int64_t row = first; row < std::min(query.rows, first + panels * plan.lanes); ++row) {
    const int64_t offset = row - first;
    out[row] = reduce(workspace.panels[offset / plan.lanes], offset % plan.lanes, options.mean);
  }
}

template <class Source, class Real>
size_t run(const Matrix& query, const Matrix& keys, const KnnOptions& options, void* out) {
  const Search<Real>& isa = search_for<Real>(options.isa);
  const Plan<Real> plan(isa.lanes, query.rows, keys.rows, query.columns, options);
  const size_t bytes = plan.threads * plan.thread_bytes() + kAlignment;
  std::vector<std::byte> memory(bytes);
  std::byte* start = memory.data() + kAlignment - reinterpret_cast<uintptr_t>(memory.data()) % kAlignment;
  std::vector<Workspace<Real>> workspaces;  // made here: nothing may throw between the threads
  for (int t = 0; t < plan.threads; ++t) workspaces.emplace_back(plan, start + t * plan.thread_bytes());

  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t group; (group = next++) < plan.groups;) {
      run_group<Source>(query, keys, options, plan, isa, group, workspaces[thread], static_cast<Real*>(out));
    }
  };
  if (plan.threads == 1) {
    work(0);  // without OpenMP, which a forked process must not enter
  } else {
#pragma omp parallel for schedule(static, 1) num_threads(plan.threads)
    for (int thread = 0; thread < plan.threads; ++thread) work(thread);
  }
  return bytes;
}

}  // namespace

// Bisection over the values, halving the number of representable ones between the bounds each time: unlike quickselect, its
// branches do not depend on the order of the list and its loops are vector code. It usually ends after six rounds.
template <class Real>
void tighten(Panel<Real>& panel, int64_t lane) {
  using Bits = std::conditional_t<sizeof(Real) == 4, uint32_t, uint64_t>;
  Real* x = panel.nearest + lane * panel.capacity;
  const int64_t n = panel.count[lane], k = panel.k;
  Real low = x[0], high = x[0];
  for (int64_t i = 1; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  // Always: fewer than k values are below low, at least k are <= high.
  int64_t kept = n;
  while (low < high && kept != k) {
    // The values are >= 0, so their bits are ordered as they are.
    const Bits floor = bit_cast<Bits>(low);
    const Real middle = bit_cast<Real>(Bits(floor + (bit_cast<Bits>(high) - floor) / 2));
    int64_t below = 0;
    for (int64_t i = 0; i < n; ++i) below += x[i] <= middle;
    if (below < k) {
      low = std::nextafter(middle, high);
    } else {
      high = middle;
      kept = below;
    }
  }
  // If values tie with the k-th, the search ended on them: as many of them as needed, and none that comes later.
  const Real limit = kept == k ? high : high > 0 ? std::nextafter(high, Real(-1)) : Real(-1);
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Real value = x[i];
    x[m] = value;
    m += value <= limit;
  }
  std::fill(x + m, x + std::max(m, k), high);
  panel.limit[lane] = limit;
  panel.count[lane] = k;
}

template void tighten<float>(Panel<float>&, int64_t);
template void tighten<double>(Panel<double>&, int64_t);

size_t knn_bonus(const Matrix& query, const Matrix& keys, const KnnOptions& options, void* out) {
  if (options.k < 1 || keys.rows < 1 || query.columns != keys.columns) {
    throw std::invalid_argument("knn_bonus: needs k >= 1, at least one key, and as many columns in query as in keys");
  }
  if (query.rows == 0) return 0;
  if (options.dtype == "float32") return run<float, float>(query, keys, options, out);
  if (options.dtype == "float64") return run<double, double>(query, keys, options, out);
  if (options.dtype == "bfloat16") return run<Bf16, float>(query, keys, options, out);
  if (options.dtype == "float16") return run<Float16, float>(query, keys, options, out);
  throw std::invalid_argument("knn_bonus: dtype '" + options.dtype + "' is not supported");
}

}  // namespace apv_fast
