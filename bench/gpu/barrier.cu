// The grid barrier of the CUDA kernels alone: how long one takes, and whether it orders what blocks write and read.
//
// Rounds of the stress test: every block writes the round's number into its row, waits, and reads another block's row.
// Two rows take turns, so that one barrier a round is enough. Blocks work for different times before they write, and
// every 16th round one of them, always another, is late by far. `fault` plants a wrong order: 1 leaves out every seventh
// barrier, 2 does not wait for the last block, 3 writes after the barrier.
#include <cuda_runtime.h>

#include "barrier.h"

namespace {

using apv_fast::cuda::Barrier;

constexpr int kThreads = 256;
constexpr int kLate = 8;  // trips to L2 and back, one after the other: some microseconds

__global__ void latency_kernel(uint32_t* counter, int rounds) {
  Barrier barrier{counter, 0};
  for (int round = 0; round < rounds; ++round) {
    barrier.arrive();
    barrier.wait(0);
  }
}

// A little work whose length differs from block to block and from round to round.
__device__ uint32_t delay(uint32_t seed) {
  seed = seed * 747796405u + 2891336453u;
  const uint32_t steps = (seed >> 16) & 63;
  for (uint32_t i = 0; i < steps; ++i) seed = seed * 1664525u + 1013904223u;
  return seed;
}

__global__ void stress_kernel(uint32_t* counter, int* rows, int* wrong, int rounds, int fault) {
  Barrier barrier{counter, 0};
  const int thread = threadIdx.x, block = blockIdx.x, blocks = gridDim.x;
  uint32_t state = block;
  for (int round = 1; round <= rounds; ++round) {
    int* turn = rows + (round & 1) * blocks * kThreads;
    state = delay(state);
    if (round % 16 == 5 && block == (round / 16) % blocks)
      for (int trip = 0; trip < kLate; ++trip) state += atomicAdd(wrong, state == 0xffffffffu) < 0;
    if (fault != 3) turn[block * kThreads + thread] = round + static_cast<int>(state == 0xffffffffu);
    if (fault != 1 || round % 7 != 3) {
      barrier.arrive();
      if (fault == 2) barrier.target -= 1;
      barrier.wait(0);
      if (fault == 2) barrier.target += 1;
    }
    if (fault == 3) turn[block * kThreads + thread] = round;
    const int other = (block + round) % blocks;
    const int seen = __ldcg(turn + other * kThreads + (kThreads - 1 - thread));
    if (seen != round) atomicAdd(wrong, 1);
  }
}

int launch(void* kernel, int blocks, void** arguments, void* stream) {
  const cudaError_t error = cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0,
                                                        static_cast<cudaStream_t>(stream));
  return static_cast<int>(error);
}

}  // namespace

extern "C" {

// counter: one number, zero. Returns a cudaError_t.
int barrier_latency(void* counter, int blocks, int rounds, void* stream) {
  void* arguments[] = {&counter, &rounds};
  return launch(reinterpret_cast<void*>(latency_kernel), blocks, arguments, stream);
}

// rows: 2·blocks·256 numbers; wrong: one number, zero, which counts reads of a wrong round.
int barrier_stress(void* counter, void* rows, void* wrong, int blocks, int rounds, int fault, void* stream) {
  void* arguments[] = {&counter, &rows, &wrong, &rounds, &fault};
  return launch(reinterpret_cast<void*>(stress_kernel), blocks, arguments, stream);
}
}
