// b is packed into panels once, then threads share the blocks of rows x panels. A block of rows and one stretch of a panel
// share the second-level cache; a block whose rows are not contiguous, or so far apart that they would fall into the same
// cache sets, is copied by the thread that multiplies it.

#include "dense.h"

#include "math.h"
#include "product.h"
#include "team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

constexpr int64_t kBlockRows = 96;
constexpr int64_t kBlockNumbers = 96 * 1024;
constexpr int64_t kDepth = 2048;  // of the sums at a time: so much of b, packed, stays in the third-level cache
constexpr int64_t kPad = 16;       // floats between rows of a copy
constexpr int64_t kCrowded = 256;  // a row stride of a multiple of so many floats makes rows share cache sets

struct Layout {
  int64_t panel_count, depth, block_rows, row_blocks;
  bool copied;  // of a's rows
  int64_t row_stride, copy_size;

  explicit Layout(const DenseArguments& x) : panel_count(panels(x.n, kColumns<float>)) {
    depth = x.k < kDepth ? x.k : kDepth;
    block_rows = depth * kBlockRows > kBlockNumbers ? kBlockNumbers / depth : kBlockRows;
    row_blocks = panels(x.m, block_rows);
    copied = x.a.column_stride != 1 || x.a.row_stride % kCrowded == 0;
    row_stride = copied ? depth + kPad : x.a.row_stride;
    copy_size = copied ? block_rows * row_stride : 0;
  }
};

// Part [begin, end) of the sums.
struct Depth {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Columns `depth` of `count` rows of a from `first` on, contiguous.
void copy_rows(const DenseArguments& x, Depth depth, int64_t first, int64_t count, int64_t stride, float* to) {
  constexpr int64_t width = kWidth<float>;
  const int64_t between = x.a.column_stride, size = depth.size();
  const float* from = x.a.data + first * x.a.row_stride + depth.begin * between;
  int64_t m = 0;
  for (; x.a.row_stride == 1 && m + width <= count; m += width) {
    int64_t k = 0;
    for (; k + width <= size; k += width) {
      Floats square[width];
      for (int64_t i = 0; i < width; ++i) square[i] = load(from + m + (k + i) * between);
      transpose(square);
      for (int64_t i = 0; i < width; ++i) store(to + (m + i) * stride + k, square[i]);
    }
    for (; k < size; ++k) {
      for (int64_t i = 0; i < width; ++i) to[(m + i) * stride + k] = from[m + i + k * between];
    }
  }
  for (; m < count; ++m) {
    const float* row = from + m * x.a.row_stride;
    if (between == 1) {
      __builtin_memcpy(to + m * stride, row, size * sizeof *row);
    } else {
      for (int64_t k = 0; k < size; ++k) to[m * stride + k] = row[k * between];
    }
  }
}

// A tile of sums joins what came before and, if they are the last, becomes a tile of the result.
void finish(const DenseArguments& x, Depth depth, const float* sums, int64_t rows, int64_t columns, int64_t n,
            float* out) {
  constexpr int64_t width = kWidth<float>;
  const bool last = depth.end == x.k;
  for (int64_t i = 0; i < rows; ++i, sums += kColumns<float>, out += x.n) {
    for (int64_t c = 0; c < columns; c += width) {
      const int64_t left = columns - c;
      const auto part = [&](const float* from) { return left >= width ? load(from) : load(from, left); };
      Floats y = load(sums + c);
      if (depth.begin > 0) y += part(out + c);
      if (last && x.bias != nullptr) y += part(x.bias + n + c);
      if (last && x.elu) y = elu(y);
      if (left >= width) {
        store(out + c, y);
      } else {
        store(out + c, y, left);
      }
    }
  }
}

int64_t workspace(const DenseArguments& x) {
  const Layout layout(x);
  return (packed_size<float>(layout.depth, x.n) + x.threads * layout.copy_size) * int64_t(sizeof(float));
}

// One thread's share of the blocks.
void multiply_blocks(const DenseArguments& x, const Layout& layout, Depth depth, const float* packed, const Team& team,
                     float* copy) {
  alignas(64) float sums[kBlockRows * kColumns<float>];
  const float* rows[kBlockRows];
  int64_t in_rows = -1;
  const Range blocks = share(layout.row_blocks * layout.panel_count, team);
  for (int64_t i = blocks.begin; i < blocks.end; ++i) {
    const int64_t block = i / layout.panel_count, first = block * layout.block_rows;
    const int64_t count = x.m - first < layout.block_rows ? x.m - first : layout.block_rows;
    if (block != in_rows) {
      if (layout.copied) copy_rows(x, depth, first, count, layout.row_stride, copy);
      const float* from = layout.copied ? copy : x.a.data + first * layout.row_stride + depth.begin;
      for (int64_t r = 0; r < count; ++r) rows[r] = from + r * layout.row_stride;
      in_rows = block;
    }
    const int64_t p = i % layout.panel_count, n = p * kColumns<float>;
    const int64_t columns = x.n - n < kColumns<float> ? x.n - n : kColumns<float>;
    const float* panel = packed + p * panel_size<float>(depth.size());
    multiply<float>(rows, count, dense(depth.size()), panel, columns, nullptr, false, sums);
    finish(x, depth, sums, count, columns, n, x.out + first * x.n + n);
  }
}

void run(const DenseArguments& x, void* memory) {
  const Layout layout(x);
  float* packed = static_cast<float*>(memory);
  float* copies = packed + packed_size<float>(layout.depth, x.n);
  run_team(x.threads, [&](const Team& team) {
    const Range own = share(layout.panel_count, team);
    for (int64_t k = 0; k == 0 || k < x.k; k += kDepth) {
      const Depth depth{k, x.k - k < kDepth ? x.k : k + kDepth};
      const Source<float> b{x.b.data + k * x.b.row_stride, x.b.row_stride, x.b.column_stride};
      if (k > 0) team.barrier();  // nobody reads the stretch before
      pack(b, depth.size(), x.n, own.begin, own.end, packed);
      team.barrier();
      multiply_blocks(x, layout, depth, packed, team, copies + team.rank * layout.copy_size);
    }
  });
}

}  // namespace

const Dense dense_layer = {workspace, run};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
