// The product of a phase: rows from a buffer that all blocks wrote, weights of the block's own tile. The warps of a
// block split the inner dimension and add up in shared memory.
#pragma once

#include "weights.h"

namespace apv_fast::cuda {

// A block's shape: WARPS warps, 16·TILES rows.
template <int WARPS, int TILES>
struct Shape {
  static constexpr int kWarps = WARPS;
  static constexpr int kTiles = TILES;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kRows = 16 * TILES;
  static constexpr int kItems = kRows * kTile;                            // rows × units of a tile; whole warps
  static constexpr int kWorkers = kItems < kThreads ? kItems : kThreads;  // threads that have items; each one unit's
  static constexpr int kTeam = kThreads / kRows;  // threads that share a row; a power of two, within a warp
  // Steps whose loads are under way together, in a product of one slab, of several, or over all gates; more would
  // spill.
  static constexpr int kAhead = 4, kAheadWide = TILES >= 4 ? 2 : 4, kAheadLong = 12 / TILES;
  static constexpr int kBatch = TILES == 1 ? 8 : 16;       // tiles' sums that a thread loads together
  static constexpr int kSlabsAtOnce = TILES == 1 ? 4 : 2;  // of a tile wider than three slabs
  static_assert(kTeam >= 1 && kTeam <= 32 && (kTeam & (kTeam - 1)) == 0);
};

template <class X, int SLABS>
struct Sums {
  float at[SLABS][X::kTiles][4];
};

// What a product reads: a buffer in layout.h's order, of so many steps, and the number of rows that are not padding.
struct Rows {
  const Quad* data;
  int steps, count;
};

// Adds rows·weights; the weights' slabs have `stride` steps, of which these begin at `first`.
template <class X, int SLABS, int AHEAD, bool RESIDENT>
APV_DEVICE void multiply(Sums<X, SLABS>& sums, const Rows& rows, const Weights& weights, int stride, int first) {
  const int steps = rows.steps;
  for (int begin = warp(); begin < steps; begin += X::kWarps * AHEAD) {
    Quad a[AHEAD][X::kTiles][2];
    APV_UNROLL
    for (int i = 0; i < AHEAD; ++i) {
      const int step = begin + i * X::kWarps;
      APV_UNROLL
      for (int m = 0; m < X::kTiles * 2; ++m) {
        const bool some = step < steps && m * 8 < rows.count;
        a[i][m / 2][m % 2] = load_fresh_if(some, rows.data + (step * X::kTiles * 2 + m) * kLanes + lane());
      }
    }
    APV_UNROLL
    for (int i = 0; i < AHEAD; ++i) {
      const int step = begin + i * X::kWarps;
      if (step >= steps) break;
      APV_UNROLL
      for (int n = 0; n < SLABS; ++n) {
        const Quad b = read_weights<RESIDENT>(weights, (n * stride + first + step) * kLanes + lane());
        APV_UNROLL
        for (int m = 0; m < X::kTiles; ++m) {
          const Quad &low = a[i][m][0], &high = a[i][m][1];
          mma(sums.at[n][m], low.x, high.x, low.y, high.y, b.x, b.y);
          mma(sums.at[n][m], low.z, high.z, low.w, high.w, b.z, b.w);
        }
      }
    }
  }
}

// The whole product of one tile, as partial sums of each warp at partial[(warp·SLABS + slab)·kItems + row·8 + unit].
template <class X, int SLABS, int AHEAD = SLABS == 1 ? X::kAhead : X::kAheadWide>
APV_DEVICE void product(float* partial, const Rows& rows, const Weights& weights, bool resident, int stride,
                        int first) {
  Sums<X, SLABS> sums = {};
  if (resident) {
    multiply<X, SLABS, AHEAD, true>(sums, rows, weights, stride, first);
  } else {
    multiply<X, SLABS, AHEAD, false>(sums, rows, weights, stride, first);
  }
  if (!fault(kFaultSumsRead)) sync_threads();  // the last product's sums have been read
  APV_UNROLL
  for (int n = 0; n < SLABS; ++n) {
    APV_UNROLL
    for (int m = 0; m < X::kTiles; ++m) {
      float* to = partial + (warp() * SLABS + n) * X::kItems + (m * 16 + lane() / 4) * kTile + lane() % 4 * 2;
      const float (&s)[4] = sums.at[n][m];
      *reinterpret_cast<Pair*>(to) = {s[0], s[1]};
      *reinterpret_cast<Pair*>(to + 8 * kTile) = {s[2], s[3]};
    }
  }
  if (!fault(kFaultSumsWritten)) sync_threads();
}

// One number of a product.
template <class X, int SLABS>
APV_DEVICE float total(const float* partial, int slab, int item) {
  float sum = 0;
  APV_UNROLL
  for (int w = 0; w < X::kWarps; ++w) sum += partial[(w * SLABS + slab) * X::kItems + item];
  return sum;
}

// Sums over the eight units of a row, or over a team of a row's threads; every thread of the warp must come.
template <int WIDTH>
APV_DEVICE float sum_over(float x) {
  APV_UNROLL
  for (int mask = WIDTH / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace apv_fast::cuda
