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
  for (int j = 0; j < kTile; ++j) h[j] = j < run.valid ? load_whole(run.from + j * run.stride) : 0;
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
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int, int column, int chunk) const {
    const int h = tile * kTile + column, k = chunk * kTile, valid = clamp(n.D - k, 0, kTile);
    return h < n.H && valid ? run_of(m, h, k, true, valid) : Run{};
  }
};

struct DistForward {
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int, int column, int chunk) const {
    const int row = n.stats_row(tile, column), k = chunk * kTile, valid = clamp(n.H - k, 0, kTile);
    return row >= 0 && valid ? run_of(m, row, k, true, valid) : Run{};
  }
};

struct StochForward {  // no product but a sum of rows: one chunk, eight units, for every row l
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Run operator()(int tile, int l) const {
    return run_of(m, tile * kTile, l, false, clamp(n.H - tile * kTile, 0, kTile));
  }
};

// Backward the matrices are read across: a tile's outputs are neighbours, and its inner dimension goes down the rows.

// A chunk of each of a tile's outputs; `valid` rows and `outputs` columns exist, the rest is zero.
struct Square {
  const Half* from;
  int64_t row, column;  // strides
  int valid, outputs;
};

APV_HD Square square_of(const ApvMatrix& m, int row, int column, int valid, int outputs) {
  if (valid <= 0 || outputs <= 0) return {};
  return {m.data + row * m.row + column * m.column, m.row, m.column, min(valid, kTile), min(outputs, kTile)};
}

struct DistBackward {  // inner: statistics
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Square operator()(int tile, int, int chunk) const {
    int valid;
    const int row = n.stats_chunk_row(chunk, valid), h = tile * kTile;
    return square_of(m, row, h, valid, n.H - h);
  }
};

struct ObsBackward {
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Square operator()(int tile, int, int chunk) const {
    const int d = tile * kTile, k = chunk * kTile;
    return square_of(m, k, d, n.H - k, n.D - d);
  }
};

struct GruBackward {  // outputs: columns [begin, begin + width) of the matrix; inner: the gates
  const ApvMatrix& m;
  const Sizes& n;
  int begin, width;
  APV_HD Square operator()(int tile, int, int chunk) const {
    const int out = tile * kTile, gate = chunk / n.deter_tiles(), d = chunk % n.deter_tiles() * kTile;
    return square_of(m, gate * n.D + d, begin + out, gate < 3 ? n.D - d : 0, width - out);
  }
};

struct StochBackward {  // slabs: of one group of latents
  const ApvMatrix& m;
  const Sizes& n;
  APV_HD Square operator()(int tile, int slab, int chunk) const {
    const int i = slab * kTile, k = chunk * kTile;
    const int l = n.C ? tile * n.C + i : tile * kTile + i;
    return square_of(m, k, l, n.H - k, n.C ? n.C - i : n.S - l);
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
    if (in_chunks(source.m, source.n)) {
      APV_UNROLL_4
      for (int i = thread(); i < share.chunks; i += THREADS) {
        const Run from = run(i);
        to[i] = from.valid ? load_whole(reinterpret_cast<const Quad*>(from.from)) : Quad{};
      }
    } else {
      APV_UNROLL_2
      for (int i = thread(); i < share.chunks; i += THREADS) to[i] = read_chunk(run(i));
    }
  }
}

// Whether every square is whole or nothing, and its rows are aligned words of `width` weights.
APV_DEVICE bool in_words(const ApvMatrix& m, const Sizes& n, int width) {
  return m.column == 1 && m.row % width == 0 && n.H % kTile == 0 && n.D % kTile == 0 &&
         (n.C ? n.C : n.S) % kTile == 0 && reinterpret_cast<uintptr_t>(m.data) % (width * sizeof(Half)) == 0;
}

// A row of a square, in as few loads as its alignment allows.
template <class Word>
APV_DEVICE void read_row(uint32_t (&row)[4], const Half* from) {
  constexpr int kWords = sizeof(Quad) / sizeof(Word);
  Word words[kWords];
  APV_UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = load_whole(reinterpret_cast<const Word*>(from) + i);
  memcpy(row, words, sizeof(Quad));
}

// One output's chunk of a square's eight rows.
APV_DEVICE Quad column_of(const uint32_t (&rows)[kTile][4], int column) {
  const auto two = [&](int j) {
    const uint32_t low = rows[j][column / 2], high = rows[j + 1][column / 2];
    return column % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
  };
  return {two(0), two(2), two(4), two(6)};
}

// A thread reads whole squares and turns them in registers: loads of sizeof(Word) bytes in place of 2.
template <class Word, int THREADS, class Source>
APV_DEVICE void load_squares(const Share& share, int tile, int steps, Quad* to, const Source& source) {
  for (int i = thread(); i < share.chunks / kTile; i += THREADS) {
    const int chunk = i % (steps * 4), slab = i / (steps * 4);
    const Square square = source(tile, slab, chunk);
    uint32_t rows[kTile][4] = {};
    if (square.valid) {
      APV_UNROLL
      for (int j = 0; j < kTile; ++j) read_row<Word>(rows[j], square.from + j * square.row);
    }
    Quad* at = to + (slab * steps + chunk / 4) * kLanes + chunk % 4;
    APV_UNROLL
    for (int column = 0; column < kTile; ++column) at[column * 4] = column_of(rows, column);
  }
}

// The same as load_tiles of a matrix that is read across.
template <int THREADS, class Source>
APV_DEVICE void load_across(const Share& share, int steps, Quad* workspace, const Source& source) {
  for (int slot = 0; slot < share.count; ++slot) {
    const int tile = share.tile(slot);
    Quad* to = destination(share, slot, workspace);
    if (in_words(source.m, source.n, sizeof(Quad) / sizeof(Half))) {
      load_squares<Quad, THREADS>(share, tile, steps, to, source);
    } else if (in_words(source.m, source.n, sizeof(uint32_t) / sizeof(Half))) {  // img_in's rows end with the action
      load_squares<uint32_t, THREADS>(share, tile, steps, to, source);
    } else {
      APV_UNROLL_2
      for (int i = thread(); i < share.chunks; i += THREADS) {
        const int l = i % kLanes, step = i / kLanes % steps, slab = i / kLanes / steps;
        const Square square = source(tile, slab, step * 4 + l % 4);
        const bool some = l / 4 < square.outputs;
        to[i] = read_chunk(some ? Run{square.from + l / 4 * square.column, square.row, square.valid} : Run{});
      }
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
