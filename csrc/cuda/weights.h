// Weights on their way into a block: from matrices of any strides to tiles in the order of layout.h, zeros where a
// matrix ends.
#pragma once

#include "layout.h"
#include "pointwise.h"

namespace apv_fast::cuda {

// Up to eight weights of one output: a chunk.
struct Run {
  const Half* from;
  int64_t stride;
  int valid;  // the rest is zero
};

APV_DEVICE Quad read_chunk(const Run& run) {
  uint32_t h[kTile];
  APV_UNROLL
  for (int j = 0; j < kTile; ++j) h[j] = j < run.valid ? run.from[j * run.stride] : 0;
  return {h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16, h[6] | h[7] << 16};
}

// Whether every chunk along a row of the matrix is 16 aligned bytes, or nothing.
APV_DEVICE bool in_chunks(const ApvMatrix& m, const Sizes& n) {
  return m.column == 1 && m.row % kTile == 0 && n.H % kTile == 0 && n.D % kTile == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % sizeof(Quad) == 0;
}

// From an element on, along its row or along its column.
APV_HD Run run_of(const ApvMatrix& m, int row, int column, bool along_row, int valid) {
  return {m.data + row * m.row + column * m.column, along_row ? m.column : m.row, valid};
}

// Where each chunk of each matrix's tiles comes from: (tile, slab, output of eight, chunk of the inner dimension).

struct GruForward {  // slabs: reset, candidate, update; inner: x, then deter, each padded to whole steps
  static constexpr bool kAlongRow = true;
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int slab, int column, int chunk) const {
    const int d = tile * kTile + column, split = n.hidden_steps() * 4;
    const int k = (chunk < split ? chunk : chunk - split) * kTile;
    const int valid = clamp((chunk < split ? n.H : n.D) - k, 0, kTile);
    return d < n.D && valid ? run_of(m, slab * n.D + d, chunk < split ? k : n.H + k, true, valid) : Run{};
  }
};

struct ObsForward {
  static constexpr bool kAlongRow = true;
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int, int column, int chunk) const {
    const int h = tile * kTile + column, k = chunk * kTile, valid = clamp(n.D - k, 0, kTile);
    return h < n.H && valid ? run_of(m, h, k, true, valid) : Run{};
  }
};

struct DistForward {
  static constexpr bool kAlongRow = true;
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int, int column, int chunk) const {
    const int row = n.stats_row(tile, column), k = chunk * kTile, valid = clamp(n.H - k, 0, kTile);
    return row >= 0 && valid ? run_of(m, row, k, true, valid) : Run{};
  }
};

struct DistBackward {  // inner: statistics
  static constexpr bool kAlongRow = false;
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int, int column, int chunk) const {
    int valid;
    const int h = tile * kTile + column, row = n.stats_chunk_row(chunk, valid);
    return h < n.H && valid ? run_of(m, row, h, false, valid) : Run{};
  }
};

struct ObsBackward {
  static constexpr bool kAlongRow = false;
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int, int column, int chunk) const {
    const int d = tile * kTile + column, k = chunk * kTile, valid = clamp(n.H - k, 0, kTile);
    return d < n.D && valid ? run_of(m, k, d, false, valid) : Run{};
  }
};

struct GruBackward {  // outputs: columns [begin, begin + width) of the matrix; inner: the gates
  static constexpr bool kAlongRow = false;
  const ApvMatrix& m;
  const Sizes& n;
  int begin, width;
  APV_HD Run operator()(int tile, int, int column, int chunk) const {
    const int out = tile * kTile + column, gate = chunk / n.deter_tiles(), d = chunk % n.deter_tiles() * kTile;
    return out < width && gate < 3 ? run_of(m, gate * n.D + d, begin + out, false, clamp(n.D - d, 0, kTile)) : Run{};
  }
};

struct StochBackward {  // slabs: of one group of latents
  static constexpr bool kAlongRow = false;
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int slab, int column, int chunk) const {
    const int i = slab * kTile + column, k = chunk * kTile, valid = clamp(n.H - k, 0, kTile);
    const int l = n.C ? tile * n.C + i : tile * kTile + i;
    return (n.C ? i < n.C : l < n.S) && valid ? run_of(m, k, l, false, valid) : Run{};
  }
};

struct StochForward {  // no product but a sum of rows: one chunk, eight units, for every row l
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int l) const {
    return run_of(m, tile * kTile, l, false, clamp(n.H - tile * kTile, 0, kTile));
  }
};

// Weights of one tile, in shared memory or in the workspace.
struct Weights {
  int shared;
  const Quad* workspace;
};

template <bool RESIDENT>
APV_DEVICE Quad read_weights(const Weights& w, int at) {
  return RESIDENT ? reinterpret_cast<const Quad*>(shared_memory())[w.shared + at] : load_fresh(w.workspace + at);
}

APV_DEVICE Weights weights_of(const Share& share, int slot, const Quad* workspace) {
  return {share.shared + slot * share.chunks, workspace + share.workspace + int64_t{share.tile(slot)} * share.chunks};
}

// Where a slot's weights go.
APV_DEVICE Quad* destination(const Share& share, int slot, Quad* workspace) {
  if (slot < share.resident) return reinterpret_cast<Quad*>(shared_memory()) + share.shared + slot * share.chunks;
  return workspace + share.workspace + int64_t{share.tile(slot)} * share.chunks;
}

// Loads a block's tiles of `steps` steps of the inner dimension a slab.
template <int THREADS, class Source>
APV_DEVICE void load_tiles(const Share& share, int steps, Quad* workspace, const Source& source) {
  for (int slot = 0; slot < share.count; ++slot) {
    Quad* to = destination(share, slot, workspace);
    const auto run = [&](int i) {
      const int l = i % kLanes, step = i / kLanes % steps, slab = i / kLanes / steps;
      return source(share.tile(slot), slab, l / 4, step * 4 + l % 4);
    };
    if (Source::kAlongRow && in_chunks(source.m, source.n)) {
      APV_UNROLL_4
      for (int i = thread(); i < share.chunks; i += THREADS) {
        const Run from = run(i);
        to[i] = from.valid ? *reinterpret_cast<const Quad*>(from.from) : Quad{};
      }
    } else {
      APV_UNROLL_2
      for (int i = thread(); i < share.chunks; i += THREADS) to[i] = read_chunk(run(i));
    }
  }
}

template <int THREADS>
APV_DEVICE void load_rows(const Share& share, Quad* workspace, const StochForward& source) {
  for (int slot = 0; slot < share.count; ++slot) {
    Quad* to = destination(share, slot, workspace);
    for (int l = thread(); l < share.chunks; l += THREADS) to[l] = read_chunk(source(share.tile(slot), l));
  }
}

}  // namespace apv_fast::cuda
