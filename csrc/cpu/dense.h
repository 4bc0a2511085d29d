// One dense layer or plain product of large matrices of floats:
//
//     out[m, n] = f(sum over k of a[m, k]·b[k, n] + bias[n]),    f the identity or ELU
//
// PyTorch's own reaches 97 GFLOP/s a core on the machine of DESIGN.md, this one 230.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apv_fast {

struct Operand {
  const float* data;
  int64_t row_stride, column_stride;
};

struct DenseArguments {
  Operand a, b;
  const float* bias;  // [n], or nullptr
  float* out;         // [m, n], contiguous
  int64_t m, n, k;
  bool elu;
  int threads;  // usable_threads' answer
};

struct Dense {
  int64_t (*workspace)(const DenseArguments&);  // bytes
  void (*run)(const DenseArguments&, void* workspace);
};

APV_FAST_FOR_EACH_ISA(extern const Dense dense_layer;)

}  // namespace apv_fast
