// The forward kernel for 16, 32 and 64 rows, and its launch.

#include "api.h"
#include "launch.cuh"

#define APV_TEXT_OF(...) #__VA_ARGS__
#define APV_TEXT(...) APV_TEXT_OF(__VA_ARGS__)

namespace apv_fast::cuda {

template <int TILES>
__global__ void __launch_bounds__(32 * kWarpsOnDevice, 1)
    forward_kernel(const __grid_constant__ ApvScan scan, const __grid_constant__ ForwardPlan plan) {
  Forward<Shape<kWarpsOnDevice, TILES>>(scan, plan).run();
}

namespace {

auto kernel_for(const ApvScan& scan) {
  switch (row_tiles(scan.batch)) {
    case 1:
      return forward_kernel<1>;
    case 2:
      return forward_kernel<2>;
    default:
      return forward_kernel<4>;
  }
}

}  // namespace

}  // namespace apv_fast::cuda

using namespace apv_fast::cuda;

APV_EXPORT const char* apv_plan_forward(ApvScan* scan) {
  return keep_text(plan_on_device<ForwardPass>(*scan, kernel_for(*scan)));
}

APV_EXPORT const char* apv_forward(const ApvScan* scan, void* stream) {
  return keep_text(launch_on_device<ForwardPass>(*scan, kernel_for(*scan), stream));
}

APV_EXPORT int64_t apv_scan_bytes(void) { return sizeof(ApvScan); }

APV_EXPORT const char* apv_architectures(void) { return APV_TEXT(__CUDA_ARCH_LIST__); }

APV_EXPORT const char* apv_probe(void) {
  Device device{};
  return keep_text(find_device(device));
}
