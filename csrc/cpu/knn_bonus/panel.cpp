// d²(q, k) = Σ (q − k)² for a block of keys and a panel of queries, and the test against each query's limit.
//
// See simd.h on what such a file may use; tests/cpu/test_native.py checks the object files for symbols that leak.

#include "panel.h"

#include "../parts/simd.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// A tile is kKeys keys against kVectors vectors of queries: as large as accumulators, totals and operands fit registers.
#if defined(__AVX512F__)
constexpr int kKeys = 4, kVectors = 3;
#else
constexpr int kKeys = 4, kVectors = 2;
#endif

// So many terms are summed before they join the total: the rounding error grows with d / 16 + 16, not with d.
constexpr int64_t kPartial = 16;

template <class Real>
constexpr int kLanes = kVectors * kWidth<Real>;

// Bit i: a[i] <= b[i]; false for NaN.
template <class Real>
inline uint64_t less_equal(Vector<Real> a, Vector<Real> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
  } else {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) {
    return _mm256_movemask_ps((__m256)(a <= b));
  } else {
    return _mm256_movemask_pd((__m256d)(a <= b));
  }
#else
  uint64_t mask = 0;
  for (int i = 0; i < kWidth<Real>; ++i) mask |= uint64_t(a[i] <= b[i]) << i;
  return mask;
#endif
}

// Squared distances [Keys, lanes] of `Keys` keys to a panel, and for each key a mask of the lanes within their limit.
template <class Real, int Keys>
inline void tile(const Real* keys, int64_t stride, int64_t d, const Panel<Real>& panel, Vector<Real>* distance,
                 uint64_t* hits) {
  using Vec = Vector<Real>;
  const Vec* query = reinterpret_cast<const Vec*>(panel.query);
  Vec total[Keys][kVectors] = {};
  for (int64_t begin = 0; begin < d; begin += kPartial) {
    const int64_t end = begin + kPartial < d ? begin + kPartial : d;
    Vec partial[Keys][kVectors] = {};
    for (int64_t c = begin; c < end; ++c) {
#pragma GCC unroll 8
      for (int i = 0; i < Keys; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const Vec difference = keys[i * stride + c] - query[c * kVectors + v];
          partial[i][v] += difference * difference;
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Keys; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[i][v] += partial[i][v];
    }
  }
  const Vec* limit = reinterpret_cast<const Vec*>(panel.limit);
  for (int i = 0; i < Keys; ++i) {
    hits[i] = 0;
    for (int v = 0; v < kVectors; ++v) {
      distance[i * kVectors + v] = total[i][v];
      hits[i] |= less_equal<Real>(total[i][v], limit[v]) << (v * kWidth<Real>);
    }
  }
}

// First all distances, then all insertions: the mispredicted branches of these do not stall the arithmetic.
template <class Real>
void search(const Real* keys, int64_t stride, int64_t n, int64_t d, Panel<Real>& panel) {
  Vector<Real> distance[kMaxKeys * kVectors];
  uint64_t hits[kMaxKeys];
  int64_t i = 0;
  for (; i + kKeys <= n; i += kKeys) {
    tile<Real, kKeys>(keys + i * stride, stride, d, panel, distance + i * kVectors, hits + i);
  }
  for (; i < n; ++i) tile<Real, 1>(keys + i * stride, stride, d, panel, distance + i * kVectors, hits + i);

  for (i = 0; i < n; ++i) {
    const Real* row = reinterpret_cast<const Real*>(distance + i * kVectors);
    for (uint64_t left = hits[i]; left != 0; left &= left - 1) {
      const int64_t lane = __builtin_ctzll(left);
      panel.nearest[lane * panel.capacity + panel.count[lane]] = row[lane];
      if (++panel.count[lane] == panel.capacity) tighten(panel, lane);
    }
  }
}

}  // namespace

const Search<float> search_float = {kLanes<float>, search<float>};
const Search<double> search_double = {kLanes<double>, search<double>};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
