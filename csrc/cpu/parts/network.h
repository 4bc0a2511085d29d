// What the problems of several ops have in common: the layers of a network, and noise.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apv_fast {

constexpr int64_t kMostLayers = 16;  // of an actor

// Numbers or the seed of counter-based noise; both null: modes.
struct NoiseSource {
  const void* values;
  const int64_t* seed;

  APV_FAST_INLINE bool there() const { return values != nullptr || seed != nullptr; }
};

// One product of the network: weight [units, inputs] and bias [units], contiguous, in the operands' dtype.
struct LayerWeights {
  const void *weight, *bias;
  int64_t units;
};

}  // namespace apv_fast
