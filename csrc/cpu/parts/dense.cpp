// b is packed into panels once, then threads share the blocks of rows x vectors of columns. A block of rows and one
// stretch of a panel share the second-level cache; a block whose rows are not operands as they lie, or so far apart that
// they would fall into the same cache sets, is copied by the thread that multiplies it.

#include "dense.h"

#include "math.h"
#include "product.h"
#include "team.h"

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

constexpr int64_t kBlockRows = 96;
constexpr int64_t kFewRows = 24;       // a smaller block would not pay for reading b
constexpr int64_t kBlockNumbers = 96 * 1024;
constexpr int64_t kDepth = 2048;       // of the sums at a time: so much of b, packed, stays in the third-level cache
constexpr int64_t kPadBytes = 64;      // between rows of a copy
constexpr int64_t kCrowdedBytes = 1024;  // rows a multiple of it apart share cache sets
constexpr int64_t kSumRows = 128;      // rows whose gradients are summed before they join the total

// Part [begin, end) of the sums.
struct Depth {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A product of operands T.
template <class T>
struct Layer {
  using Real = Wide<T>;
  static constexpr int64_t kLanes = kWidth<Real>;
  const DenseArguments& x;
  int64_t panel_count, vectors, depth, row_blocks, block_rows;
  bool copied;  // of a's rows
  int64_t row_stride, copy_size;

  explicit Layer(const DenseArguments& x)
      : x(x), panel_count(panels(x.n, kColumns<T>)), vectors(panels(x.n, kLanes)) {
    depth = x.k < kDepth ? x.k : kDepth;
    const int64_t most = depth * kBlockRows > kBlockNumbers ? kBlockNumbers / depth : kBlockRows;
    row_blocks = panels(x.m, most);
    const int64_t even = panels(row_blocks, x.threads) * x.threads;  // as many for every thread
    if (row_blocks > 1 && x.m / even >= kFewRows) row_blocks = even;
    block_rows = panels(x.m, row_blocks);
    const bool operands = std::is_same_v<T, Real> && x.a.column_stride == 1;
    copied = !operands || x.a.row_stride * int64_t(sizeof(Real)) % kCrowdedBytes == 0;
    row_stride = copied ? padded<T>(depth) + kPadBytes / int64_t(sizeof(Element<T>)) : x.a.row_stride;
    copy_size = copied ? block_rows * row_stride : 0;
  }

  // Between rows of the sums of several parts, which are floats: in the result itself, if that is floats.
  int64_t total_stride() const { return std::is_same_v<T, Real> ? x.out_stride : x.n; }

  int64_t workspace() const {
    return (packed_size<T>(depth, x.n) + x.threads * copy_size) * int64_t(sizeof(Element<T>));
  }

  // Columns `part` of `count` rows of a from `first` on, as operands.
  void copy_rows(Depth part, int64_t first, int64_t count, Element<T>* to) const {
    const int64_t between = x.a.column_stride, size = part.size();
    const Real* from = static_cast<const Real*>(x.a.data) + first * x.a.row_stride + part.begin * between;
    int64_t m = 0;
    for (; x.a.row_stride == 1 && m + kLanes <= count; m += kLanes) turn_rows(from + m, size, to + m * row_stride);
    for (; m < count; ++m) {
      const Real* row = from + m * x.a.row_stride;
      Element<T>* out = to + m * row_stride;
      if (between == 1) {
        to_operands<T>(row, size, out);
      } else {
        for (int64_t k = 0; k < size; ++k) out[k] = operand<T>(row[k * between]);
        for (int64_t k = size; k < padded<T>(size); ++k) out[k] = Element<T>{};
      }
    }
  }

  // A vector of rows whose numbers lie beside each other.
  void turn_rows(const Real* from, int64_t size, Element<T>* to) const {
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) {
      Vector<Real> square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) square[i] = load(from + (k + i) * x.a.column_stride);
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store_operand<T>(to + i * row_stride + k, square[i]);
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      for (int64_t j = k; j < size; ++j) to[i * row_stride + j] = operand<T>(from[i + j * x.a.column_stride]);
      for (int64_t j = size; j < padded<T>(size); ++j) to[i * row_stride + j] = Element<T>{};
    }
  }

  // The sums of `count` rows' operands join `totals`; after the last part they are results.
  void sum_rows(Depth part, const Element<T>* const* rows, int64_t first, int64_t count, Real* totals) const {
    for (int64_t r = 0; r < count; ++r) {
      Vector<Real> sums = {};
      for (int64_t k = 0; k < part.size();) {
        Vector<Real> some = {};
        for (const int64_t end = k + kFewTerms * kLanes; k < end && k < part.size(); k += kLanes) {
          const int64_t left = part.size() - k;
          some += left >= kLanes ? load(rows[r] + k) : load(rows[r] + k, left);
        }
        sums += some;
      }
      Real& total = totals[first + r];
      total = part.begin == 0 ? sum(sums) : total + sum(sums);
      if (part.end == x.k) static_cast<T*>(x.row_sums)[first + r] = narrow<T>(total);
    }
  }

  // A tile of sums joins what came `before` (nullptr: there is one part) and, after the last, becomes one of the result.
  void finish(Depth part, Real* before, const Real* sums, int64_t rows, int64_t columns, int64_t n, T* out) const {
    const bool last = part.end == x.k;
    const T* bias = last && x.bias != nullptr ? static_cast<const T*>(x.bias) + n : nullptr;
    for (int64_t i = 0; i < rows; ++i, sums += kColumns<T>, out += x.out_stride) {
      Real* so_far = before == nullptr ? nullptr : before + i * total_stride();
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t left = columns - c;
        const auto part_of = [&](const auto* from) { return left >= kLanes ? load(from) : load(from, left); };
        const auto keep = [&](auto* to, Vector<Real> y) { left >= kLanes ? store(to, y) : store(to, y, left); };
        Vector<Real> y = load(sums + c);
        if (part.begin > 0) y += part_of(so_far + c);
        if (!last) {
          keep(so_far + c, y);
          continue;
        }
        if (bias != nullptr) y += part_of(bias + c);
        keep(out + c, x.elu ? elu(y) : y);
      }
    }
  }

  // One thread's share: of every block of rows all vectors of columns, or some. `totals` [m, n] holds the sums so far if
  // there are several parts, `row_totals` [m] those of the rows.
  void multiply_blocks(Depth part, const Element<T>* packed, const Team& team, Element<T>* copy, Real* totals,
                       Real* row_totals) const {
    constexpr int64_t panel_vectors = kColumns<T> / kLanes;
    alignas(64) Real sums[kBlockRows * kColumns<T>];
    const Element<T>* rows[kBlockRows];
    const Range own = share(row_blocks * vectors, team);
    for (int64_t i = own.begin; i < own.end;) {
      const int64_t block = i / vectors, begin = i % vectors;
      const int64_t end = begin + own.end - i < vectors ? begin + own.end - i : vectors;
      const int64_t first = x.m * block / row_blocks, count = x.m * (block + 1) / row_blocks - first;
      if (copied) copy_rows(part, first, count, copy);
      const auto* from = copied ? copy : static_cast<const Element<T>*>(x.a.data) + first * row_stride + part.begin;
      for (int64_t r = 0; r < count; ++r) rows[r] = from + r * row_stride;
      if (x.row_sums != nullptr && begin == 0) sum_rows(part, rows, first, count, row_totals);
      for (int64_t v = begin; v < end;) {
        const int64_t next = v / panel_vectors * panel_vectors + panel_vectors, last = next < end ? next : end;
        const int64_t n = v * kLanes, columns = (last * kLanes < x.n ? last * kLanes : x.n) - n;
        const Element<T>* panel = packed + v / panel_vectors * panel_size<T>(part.size());
        multiply<T>(rows, count, part.size(), panel + v % panel_vectors * kLanes * kPair<T>, columns, nullptr, kFewTerms,
                    sums);
        finish(part, totals == nullptr ? nullptr : totals + first * total_stride() + n, sums, count, columns, n,
               static_cast<T*>(x.out) + first * x.out_stride + n);
        v = last;
      }
      i += end - begin;
    }
  }
};

// Numbers for the sums of several parts of the depth, those of the rows first.
int64_t row_totals(const DenseArguments& x) { return x.row_sums != nullptr ? x.m : 0; }

template <class T>
int64_t totals(const DenseArguments& x) {
  return x.k > kDepth && !std::is_same_v<T, Wide<T>> ? x.m * x.n : 0;
}

template <class T>
int64_t workspace(const DenseArguments& x) {
  return Layer<T>(x).workspace() + (row_totals(x) + totals<T>(x)) * int64_t(sizeof(Wide<T>));
}

template <class T>
void run(const DenseArguments& x, void* memory) {
  const Layer<T> layer(x);
  Element<T>* packed = static_cast<Element<T>*>(memory);
  Element<T>* copies = packed + packed_size<T>(layer.depth, x.n);
  Wide<T>* of_rows = reinterpret_cast<Wide<T>*>(static_cast<char*>(memory) + layer.workspace());
  Wide<T>* so_far = nullptr;
  if constexpr (std::is_same_v<T, Wide<T>>) {
    so_far = static_cast<Wide<T>*>(x.out);
  } else if (x.k > kDepth) {
    so_far = of_rows + row_totals(x);
  }
  run_team(x.threads, [&](const Team& team) {
    const Range own = share(layer.panel_count, team);
    for (int64_t k = 0; k == 0 || k < x.k; k += kDepth) {
      const Depth part{k, x.k - k < kDepth ? x.k : k + kDepth};
      const Source<T> b{static_cast<const T*>(x.b.data) + k * x.b.row_stride, x.b.row_stride, x.b.column_stride};
      if (k > 0) team.barrier();  // nobody reads the part before
      pack(b, part.size(), x.n, own.begin, own.end, packed);
      team.barrier();
      layer.multiply_blocks(part, packed, team, copies + team.rank * layer.copy_size, so_far, of_rows);
    }
  });
}

template <class T>
int64_t elu_workspace(const EluBackward& x) {
  return panels(x.m, kSumRows) * x.n * int64_t(sizeof(Wide<T>));
}

// Rows [first, last): the gradients, and their sums [n].
template <class T>
void elu_rows(const EluBackward& x, int64_t first, int64_t last, Wide<T>* sums) {
  constexpr int64_t lanes = kWidth<Wide<T>>;
  __builtin_memset(sums, 0, x.n * sizeof *sums);
  for (int64_t m = first; m < last; ++m) {
    const T* grad = static_cast<const T*>(x.grad) + m * x.n;
    const T* y = static_cast<const T*>(x.y) + m * x.n;
    T* out = static_cast<T*>(x.out) + m * x.n;
    for (int64_t n = 0; n < x.n; n += lanes) {
      const int64_t left = x.n - n;
      const auto part_of = [&](const auto* from) { return left >= lanes ? load(from) : load(from, left); };
      const auto keep = [&](auto* to, Vector<Wide<T>> z) { left >= lanes ? store(to, z) : store(to, z, left); };
      const Vector<Wide<T>> g = part_of(grad + n) * elu_grad(part_of(y + n));
      keep(out + n, g);
      keep(sums + n, part_of(sums + n) + g);
    }
  }
}

template <class T>
void elu_run(const EluBackward& x, void* memory) {
  Wide<T>* sums = static_cast<Wide<T>*>(memory);
  const int64_t blocks = panels(x.m, kSumRows);
  run_team(x.threads, [&](const Team& team) {
    const Range own = share(blocks, team);
    for (int64_t b = own.begin; b < own.end; ++b) {
      const int64_t last = (b + 1) * kSumRows;
      elu_rows<T>(x, b * kSumRows, last < x.m ? last : x.m, sums + b * x.n);
    }
    team.barrier();
    const Range columns = share(x.n, team);
    for (int64_t n = columns.begin; n < columns.end; ++n) {
      Wide<T> total = 0;
      for (int64_t b = 0; b < blocks; ++b) total += sums[b * x.n + n];
      static_cast<T*>(x.sum)[n] = narrow<T>(total);
    }
  });
}

}  // namespace

const ByDtype<Pass<DenseArguments>> dense = {
    {workspace<float>, run<float>}, {workspace<double>, run<double>}, {workspace<Bf16>, run<Bf16>}};
const ByDtype<Pass<EluBackward>> elu_backward = {
    {elu_workspace<float>, elu_run<float>},
    {elu_workspace<double>, elu_run<double>},
    {elu_workspace<Bf16>, elu_run<Bf16>}};

}  // namespace APV_FAST_ISA
}  // namespace apv_fast
