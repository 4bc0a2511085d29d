// The backward kernel for 16, 32 and 64 rows, and its launch.

#include "api.h"
#include "launch.cuh"

namespace apv_fast::cuda {

template <int TILES>
__global__ void __launch_bounds__(32 * kWarpsOnDevice, 1)
    backward_kernel(const __grid_constant__ ApvScan scan, const __grid_constant__ BackwardPlan plan) {
  Backward<Shape<kWarpsOnDevice, TILES>>(scan, plan).run();
}

namespace {

auto kernel_for(const ApvScan& scan) {
  switch (row_tiles(scan.batch)) {
    case 1:
      return backward_kernel<1>;
    case 2:
      return backward_kernel<2>;
    default:
      return backward_kernel<4>;
  }
}

}  // namespace

}  // namespace apv_fast::cuda

using namespace apv_fast::cuda;

APV_EXPORT const char* apv_plan_backward(ApvScan* scan) {
  return keep_text(plan_on_device<BackwardPass>(*scan, kernel_for(*scan)));
}

APV_EXPORT const char* apv_backward(const ApvScan* scan, void* stream) {
  return keep_text(launch_on_device<BackwardPass>(*scan, kernel_for(*scan), stream));
}
