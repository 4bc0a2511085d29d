// A bfloat16 in memory: the upper half of a float.
#pragma once

#include <cstdint>

namespace apv_fast {

struct Bf16 {
  uint16_t bits;
};

}  // namespace apv_fast
