// What both directions of the scan share.
#pragma once

#include "barrier.h"
#include "philox.h"
#include "product.h"

namespace apv_fast::cuda {

template <class X>
struct Walk {
  const ApvScan& scan;
  const Sizes n;
  Barrier barrier;

  APV_DEVICE Walk(const ApvScan& scan, int64_t counter)
      : scan(scan), n(scan), barrier{static_cast<uint32_t*>(bytes(counter)), 0} {}

  // The workspace at an offset in bytes, and shared memory.
  APV_DEVICE void* bytes(int64_t offset) const { return static_cast<char*>(scan.workspace) + offset; }
  APV_DEVICE Quad* quads(int64_t offset) const { return static_cast<Quad*>(bytes(offset)); }
  APV_DEVICE Pair* pairs(int64_t offset) const { return static_cast<Pair*>(bytes(offset)); }
  APV_DEVICE Rows rows(int64_t buffer, int steps) const { return {quads(buffer), steps, n.B}; }
  APV_DEVICE float* shared(int64_t offset) const { return reinterpret_cast<float*>(shared_memory() + offset); }
  APV_DEVICE int64_t step_of(int row, int t) const { return int64_t{row} * n.T + t; }
  APV_DEVICE Half* published(int64_t buffer, int row, int chunk, int unit) const {
    return static_cast<Half*>(bytes(buffer)) + chunk_at(row, chunk, X::kTiles) * kTile + unit;
  }
  APV_DEVICE bool sampled() const { return scan.noise || scan.seed; }

  // Of sample `index` of L, made from the seed if it was not given; 0 for modes.
  APV_DEVICE float noise_at(int row, int t, int index) const {
    if (scan.noise) return scan.noise[step_of(row, t) * n.L() + index];
    if (!scan.seed) return 0;
    const uint32_t flat = static_cast<uint32_t>(((scan.first_row + row) * n.T + t) * n.L() + index);
    const uint64_t seed = static_cast<uint64_t>(*scan.seed);
    return n.C ? gumbel(seed, flat) : normal(seed, flat);
  }

  // f(item, row, unit) for this thread's share of a tile; whole warps come together.
  template <class F>
  static APV_DEVICE void each_item(const F& f) {
    for (int item = thread(); item < X::kItems; item += X::kThreads) f(item, item / kTile, item % kTile);
  }

  // 1 where the previous state is kept, of two steps at a time.
  APV_DEVICE void stage_keep(float* to, int t) const {
    if (t < 0 || t >= n.T) return;
    for (int row = thread(); row < X::kRows; row += X::kThreads) {
      to[t % 2 * X::kRows + row] = row < n.B && scan.keep[step_of(row, t)] ? 1.0f : 0.0f;
    }
  }

  // Step t of [B, T, H], of a block's own units.
  APV_DEVICE void stage_rows(float* to, const Share& share, const Half* from, int t) const {
    if (t < 0 || t >= n.T) return;
    for (int slot = 0; slot < share.count; ++slot) {
      each_item([&](int item, int row, int unit) {
        const int h = share.tile(slot) * kTile + unit;
        to[slot * X::kItems + item] = row < n.B && h < n.H ? widen(from[step_of(row, t) * n.H + h]) : 0;
      });
    }
  }
};

}  // namespace apv_fast::cuda
