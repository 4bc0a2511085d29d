// knn_bonus(query [Q, d], keys [N, d]) -> [Q]: mean, or last, of the k smallest ‖query − key‖₂.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../parts/isa.h"

namespace apv_fast {

// A matrix in memory, strides in elements.
struct Matrix {
  const void* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

struct KnnOptions {
  int64_t k;          // >= 1; more than N means N
  bool mean;          // else the k-th smallest
  std::string dtype;  // of query and keys: "float32", "float64", "bfloat16", "float16"
  Isa isa;            // whose code runs
  int threads;        // at most so many
};

// Writes out[Q], doubles for float64 and else floats. Returns the bytes of working memory that it used.
//
// A NaN distance is never among the k smallest while another is left; a result that needs one is NaN. The result does not
// depend on the number of threads. A process forked from one that loaded this module uses one thread: OpenMP's
// threads do not survive a fork. Throws std::invalid_argument, std::bad_alloc.
size_t knn_bonus(const Matrix& query, const Matrix& keys, const KnnOptions& options, void* out);

}  // namespace apv_fast
