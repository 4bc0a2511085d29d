// The vector functions of math.h and noise.h one by one, for tests.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace apv_fast {

struct FunctionProblem {
  int64_t count;
  const char* name;
  const void* from;  // of noise: the address of the seed
  void* out;
};

APV_FAST_FOR_EACH_ISA(extern const ByDtype<Function<FunctionProblem>> apply_function;)

}  // namespace apv_fast
