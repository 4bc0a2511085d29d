// The prior's samples: kernels and launches.

#include "api.h"
#include "launch.cuh"
#include "sample.h"

namespace apv_fast::cuda {

using OnDevice = Sampler<256>;

__global__ void __launch_bounds__(OnDevice::kThreads) sample_kernel(const __grid_constant__ ApvSample sample) {
  OnDevice{sample}.forward();
}

__global__ void __launch_bounds__(OnDevice::kThreads) sample_backward_kernel(const __grid_constant__ ApvSample sample) {
  OnDevice{sample}.backward();
}

}  // namespace apv_fast::cuda

using namespace apv_fast::cuda;

APV_EXPORT const char* apv_sample(const ApvSample* sample, int backward, void* stream) {
  const dim3 blocks(OnDevice::blocks(*sample));
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (backward) {
    sample_backward_kernel<<<blocks, OnDevice::kThreads, 0, on>>>(*sample);
  } else {
    sample_kernel<<<blocks, OnDevice::kThreads, 0, on>>>(*sample);
  }
  const cudaError_t error = cudaGetLastError();
  return keep_text(error == cudaSuccess ? "" : failure("launching the kernel", error));
}
