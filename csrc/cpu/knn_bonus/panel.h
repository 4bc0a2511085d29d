// The inner loop of knn_bonus: one source, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "../parts/isa.h"

namespace apv_fast {

// Keys that one call of `search` takes at most.
constexpr int64_t kMaxKeys = 32;

// `lanes` queries side by side, and for each the smallest squared distances that were met so far.
template <class Real>
struct Panel {
  Real* query;      // [d, lanes]: a query a column; aligned to 64 bytes, as is limit
  Real* limit;      // [lanes]: only distances <= limit are still of interest; < 0 in unused lanes
  Real* nearest;    // [lanes, capacity]: a superset of the k smallest squared distances, in no order, never NaN
  int64_t* count;   // [lanes]: how many of them
  int64_t capacity; // > k
  int64_t k;
};

// Drops all but the k smallest distances of a lane and lowers its limit. In knn_bonus.cpp.
template <class Real>
void tighten(Panel<Real>& panel, int64_t lane);

// What one instruction set provides.
template <class Real>
struct Search {
  int64_t lanes;
  // Compares `n` keys (rows of `d`, `stride` apart) with every query of the panel.
  void (*search)(const Real* keys, int64_t stride, int64_t n, int64_t d, Panel<Real>& panel);
};

APV_FAST_FOR_EACH_ISA(extern const Search<float> search_float; extern const Search<double> search_double;)

}  // namespace apv_fast
