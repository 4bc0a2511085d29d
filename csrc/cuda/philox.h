// Counter-based noise (Salmon et al. 2011): Philox-4x32-10, key = seed, counter = (index, 0, 0, 0). The twin of
// apv_fast/reference/noise.py: uniforms have the same bits.
#pragma once

#include "pointwise.h"

namespace apv_fast::cuda {

APV_HD uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

struct Words {
  uint32_t first, second;
};

APV_HD Words philox(uint64_t seed, uint32_t index) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = index, c1 = 0, c2 = 0, c3 = 0;
  APV_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = high_product(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// In (0, 1) with 23 bits: neither end is reached, and both roundings are exact.
APV_HD float open_unit(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * (1.0f / 8388608.0f); }

APV_HD float gumbel(uint64_t seed, uint32_t index) { return -logf(-logf(open_unit(philox(seed, index).first))); }

// Box and Muller.
APV_HD float normal(uint64_t seed, uint32_t index) {
  const Words words = philox(seed, index);
  const float radius = sqrtf(-2.0f * logf(open_unit(words.first)));
#if defined(__CUDA_ARCH__)
  return radius * cospif(2.0f * open_unit(words.second));  // no slow path for large angles
#else
  return radius * static_cast<float>(cos(6.283185307179586 * open_unit(words.second)));
#endif
}

}  // namespace apv_fast::cuda
