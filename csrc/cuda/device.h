// What the kernels use of the machine: one instruction or intrinsic each on a GPU. Compiled by anything but nvcc, the
// same names are the emulator's (host/emulator.h), so that the very source of the kernels runs in the tests.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#define APV_HD __host__ __device__ __forceinline__
#define APV_DEVICE __device__ __forceinline__
#define APV_UNROLL _Pragma("unroll")
#define APV_UNROLL_2 _Pragma("unroll 2")
#define APV_UNROLL_4 _Pragma("unroll 4")
#else
#define APV_HD inline
#define APV_DEVICE inline
#define APV_UNROLL
#define APV_UNROLL_2
#define APV_UNROLL_4
#endif

namespace apv_fast::cuda {

using Half = uint16_t;  // bfloat16's bits

struct alignas(16) Quad {  // eight bfloat16
  uint32_t x, y, z, w;
};

struct alignas(8) Pair {
  float first, second;
};

}  // namespace apv_fast::cuda

#if defined(__CUDACC__)

namespace apv_fast::cuda {

APV_DEVICE int thread() { return threadIdx.x; }
APV_DEVICE int lane() { return threadIdx.x & 31; }
APV_DEVICE int warp() { return threadIdx.x >> 5; }
APV_DEVICE int block() { return blockIdx.x; }
APV_DEVICE int blocks() { return gridDim.x; }
APV_DEVICE void sync_threads() { __syncthreads(); }
APV_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
APV_DEVICE bool fault(int) { return false; }  // the emulator leaves out what a test asks it to

APV_DEVICE char* shared_memory() {
  extern __shared__ Quad memory[];
  return reinterpret_cast<char*>(memory);
}

// What nobody writes while the kernel runs, from an address that is a multiple of its size.
template <class T>
APV_DEVICE T load_whole(const T* at) {
  return *at;
}

// Loads from the L2 cache: other multiprocessors wrote this since the kernel began, and L1 caches are not coherent.
APV_DEVICE Quad load_fresh(const Quad* at) {
  Quad q;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(at));
  return q;
}
// Zeros unless `some`, without a branch, so that many of them are under way together.
APV_DEVICE Quad load_fresh_if(bool some, const Quad* at) {
  Quad q;
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\tmov.u32 %0, 0;\n\tmov.u32 %1, 0;\n\tmov.u32 %2, 0;\n\t"
      "mov.u32 %3, 0;\n\t@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(q.x), "=&r"(q.y), "=&r"(q.z), "=&r"(q.w)
      : "l"(at), "r"(static_cast<uint32_t>(some)));
  return q;
}
APV_DEVICE Pair load_fresh(const Pair* at) {
  Pair p;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(p.first), "=f"(p.second) : "l"(at));
  return p;
}
APV_DEVICE float load_fresh(const float* at) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(at));
  return x;
}

// c += a·b, 16×16 by 16×8, bfloat16 with float32 sums. Of a: rows lane/4 (a0, a2) and lane/4 + 8 (a1, a3); b: column
// lane/4; both at k = 2·(lane%4) + {0, 1} and 8 more (a2, a3, b1). c: those rows, columns 2·(lane%4) + {0, 1}.
APV_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Adds 1 after everything that this thread wrote, and what it has seen of others, is visible to the whole GPU.
APV_DEVICE void add_release(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Returns when the counter, modulo 2^32, has reached the target, with everything that was released before visible.
APV_DEVICE void wait_acquire(const uint32_t* counter, uint32_t target) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (static_cast<int32_t>(seen - target) < 0);
}

}  // namespace apv_fast::cuda

#else
#include "host/emulator.h"
#endif
