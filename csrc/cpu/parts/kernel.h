// What an op's header offers its bind.cpp: the functions of its kernels, by the dtype of the tensors. A kernel's source
// leaves one such table for every instruction set, see isa.h.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apv_fast {

// An entry a dtype; null where there is none.
template <class Entry>
struct ByDtype {
  Entry float32, float64, bfloat16;
};

// A kernel that reads and writes its tensors and no other memory.
template <class Problem>
using Function = void (*)(const Problem& problem);

// One with working memory, aligned to 64 bytes.
template <class Problem>
struct Pass {
  int64_t (*bytes)(const Problem& problem);
  void (*run)(const Problem& problem, void* memory);
};

}  // namespace apv_fast
