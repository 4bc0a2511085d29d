// Dense layers and plain products of large matrices, and the way back through ELU:
//
//     out[m, n] = f(sum over k of a[m, k]·b[k, n] + bias[n]),    f the identity or ELU
//
// PyTorch's own fp32 product reaches 97 GFLOP/s a core on the machine of docs/notes/2026-11-cpu-scan.md, this one 230.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace apv_fast {

struct Operand {
  const void* data;
  int64_t row_stride, column_stride;  // in elements
};

// a, b, bias, out and row_sums are floats or doubles; or a is floats, which are rounded on the way, and the others Bf16.
struct DenseArguments {
  Operand a, b;
  const void* bias;    // [n], or nullptr
  void* out;           // [m, n], rows out_stride apart
  void* row_sums;      // [m], the sum of every row of a, or nullptr
  int64_t m, n, k, out_stride;
  bool elu;
  int threads;  // usable_threads' answer
};

// out = grad·ELU'(z) and its sum over the rows, from y = ELU(z); all contiguous.
struct EluBackward {
  const void *grad, *y;  // [m, n]
  void* out;             // [m, n]
  void* sum;             // [n]
  int64_t m, n;
  int threads;
};

// `dense` by the dtype of b.
APV_FAST_FOR_EACH_ISA(extern const ByDtype<Pass<DenseArguments>> dense;
                      extern const ByDtype<Pass<EluBackward>> elu_backward;)

}  // namespace apv_fast
