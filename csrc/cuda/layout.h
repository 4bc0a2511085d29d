// Who owns what, and where it lies.
//
// A tile is eight outputs of one product: the width of a tensor-core operand. A block owns whole tiles for the whole
// scan. Eight consecutive units of one row, in bfloat16, are one chunk of 16 bytes: what a tile gives to the next
// product, and what one thread feeds to the tensor cores at once. Products run over their inner dimension in steps of
// 32, four chunks; within a step its order is free as long as both operands agree, so that both are stored as the
// threads of a warp read them: lane l holds the chunk l%4 of row (or column) l/4. No ldmatrix, no bank conflict, no
// partial sector.
#pragma once

#include "scan.h"

namespace apv_fast::cuda {

constexpr int kTile = 8;      // outputs
constexpr int kStep = 32;     // of the inner dimension
constexpr int kLanes = 32;    // and chunks: 8 rows × 4
constexpr int kMaxRows = 64;  // of one launch

// What a test can ask the emulator to leave out: the wait after phase 1 to 5, or one of these.
constexpr int kFaultStart = 6;
constexpr int kFaultSumsRead = 10, kFaultSumsWritten = 11;

APV_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }
APV_HD int round_up(int a, int b) { return ceil_div(a, b) * b; }
APV_HD int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

struct Sizes {
  int B, T, D, H, S, C;  // C = 0: Gaussian

  APV_HD explicit Sizes(const ApvScan& scan)
      : B(static_cast<int>(scan.batch)),
        T(static_cast<int>(scan.length)),
        D(static_cast<int>(scan.deter)),
        H(static_cast<int>(scan.hidden)),
        S(static_cast<int>(scan.stoch)),
        C(static_cast<int>(scan.discrete)) {}

  APV_HD int L() const { return C ? S * C : S; }
  APV_HD int M() const { return C ? S * C : 2 * S; }
  APV_HD int deter_tiles() const { return ceil_div(D, kTile); }
  APV_HD int hidden_tiles() const { return ceil_div(H, kTile); }
  APV_HD int deter_steps() const { return ceil_div(D, kStep); }
  APV_HD int hidden_steps() const { return ceil_div(H, kStep); }

  // Forward, a tile of statistics: eight classes of one latent, or mean and deviation of four latents, alternating.
  APV_HD int class_tiles() const { return ceil_div(C, kTile); }  // of one latent
  APV_HD int stats_tiles() const { return C ? S * class_tiles() : ceil_div(S, kTile / 2); }
  // The row of obs_dist that is a tile's column, or -1.
  APV_HD int stats_row(int tile, int column) const {
    if (C) {
      const int c = tile % class_tiles() * kTile + column;
      return c < C ? tile / class_tiles() * C + c : -1;
    }
    const int s = tile * (kTile / 2) + column / 2;
    return s < S ? column % 2 * S + s : -1;
  }

  // Backward, statistics as an inner dimension: chunks of one latent's classes, or all means' chunks, then deviations'.
  APV_HD int groups() const { return C ? S : ceil_div(S, kTile); }
  APV_HD int group_tiles() const { return C ? class_tiles() : 1; }  // of latents: classes, or eight Gaussians
  APV_HD int group_width() const { return group_tiles() * kTile; }
  APV_HD int stats_chunks() const { return C ? S * class_tiles() : 2 * groups(); }
  APV_HD int stats_steps() const { return ceil_div(stats_chunks(), kStep / kTile); }
  // First row of obs_dist in a chunk; `valid` rows follow it.
  APV_HD int stats_chunk_row(int chunk, int& valid) const {
    valid = 0;
    if (chunk >= stats_chunks()) return 0;
    if (C) {
      const int c = chunk % class_tiles() * kTile;
      valid = clamp(C - c, 0, kTile);
      return chunk / class_tiles() * C + c;
    }
    const int s = chunk % groups() * kTile;
    valid = clamp(S - s, 0, kTile);
    return chunk / groups() * S + s;
  }

  // Backward, the gates' gradients as an inner dimension: chunks of all resets, then candidates, then updates.
  APV_HD int gate_steps() const { return ceil_div(3 * deter_tiles(), kStep / kTile); }
};

// Where a row's chunk lies in a buffer that products read, in chunks. Such a buffer holds `tiles`·16 rows.
APV_HD int chunk_at(int row, int chunk, int tiles) {
  const int step = chunk / 4, quarter = chunk % 4, tile = row / 16, half = row % 16 / 8;
  return ((step * tiles + tile) * 2 + half) * kLanes + row % 8 * 4 + quarter;
}

APV_HD int buffer_chunks(int steps, int tiles) { return steps * tiles * 2 * kLanes; }

// A matrix cut into tiles, of `slabs`·8 outputs each, over the blocks: every n-th tile, from the first block on or, to
// even out what the blocks hold, from the last one back. The first `resident` of a block's tiles are in its shared
// memory, the rest in the workspace, which L2 caches.
struct Share {
  int tiles, chunks;  // chunks of one tile's weights
  int first, stride, count;
  int resident, shared;  // offset in shared memory, in chunks
  int64_t workspace;     // offset in the workspace, in chunks; room for all tiles of all blocks

  APV_HD int tile(int slot) const { return first + slot * stride; }
};

// How the matrices of one kernel share the memory that is left for weights; the same on the host and in each block.
struct Division {
  int block, blocks;
  int shared, shared_end;  // in chunks
  int64_t workspace;       // in chunks

  APV_HD Share take(int tiles, int chunks, bool from_last) {
    Share share{};
    share.tiles = tiles;
    share.chunks = chunks;
    share.first = from_last ? blocks - 1 - block : block;
    share.stride = blocks;
    share.count = share.first < tiles ? ceil_div(tiles - share.first, blocks) : 0;
    share.resident = clamp((shared_end - shared) / chunks, 0, share.count);
    share.shared = shared;
    share.workspace = workspace;
    shared += share.resident * chunks;
    workspace += static_cast<int64_t>(tiles) * chunks;
    return share;
  }
};

// For the block that asks.
APV_DEVICE Division division_of(const ApvScan& scan, int64_t shared_weights) {
  return {block(), blocks(), static_cast<int>(shared_weights / static_cast<int64_t>(sizeof(Quad))),
          static_cast<int>(scan.shared_bytes / static_cast<int64_t>(sizeof(Quad))), 0};
}

// Slots that a block needs for its state: the most tiles that any block owns.
APV_HD int slots(int tiles, int blocks) { return ceil_div(tiles, blocks); }

// Offsets handed out one after the other, 16 bytes aligned.
struct Arena {
  int64_t used = 0;

  APV_HD int64_t take(int64_t bytes) {
    const int64_t at = used;
    used += (bytes + 15) / 16 * 16;
    return at;
  }
};

}  // namespace apv_fast::cuda
