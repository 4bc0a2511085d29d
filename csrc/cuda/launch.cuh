// From a description to a cooperative launch.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "plan.h"

namespace apv_fast::cuda {

inline std::string failure(const char* what, cudaError_t error) {
  return std::string(what) + ": " + cudaGetErrorString(error);
}

// The current device, or why it cannot run a cooperative kernel.
inline std::string find_device(Device& device) {
  int index = 0, cooperative = 0, major = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  ask(device.blocks, cudaDevAttrMultiProcessorCount);
  ask(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(cooperative, cudaDevAttrCooperativeLaunch);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  if (error != cudaSuccess) return failure("asking the device", error);
  if (!cooperative) return "the device or its driver has no cooperative launch";
  if (major < 8) return "the GPU is older than compute capability 8.0";
  return {};
}

// Allows a kernel all the shared memory there is, for this plan and others, and asks whether all of its blocks run at
// the same time.
template <class Kernel>
std::string check_occupancy(Kernel kernel, const ApvScan& scan, const Device& device) {
  const int threads = 32 * kWarpsOnDevice, bytes = static_cast<int>(scan.shared_bytes);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  int per_multiprocessor = 0;
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, bytes);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next caller of the runtime would find it
    return failure("asking for the kernel's occupancy", error);
  }
  if (per_multiprocessor * device.blocks < scan.blocks) {
    return std::to_string(scan.blocks) + " blocks do not run at the same time on " + std::to_string(device.blocks) +
           " multiprocessors, " + std::to_string(per_multiprocessor) + " on each";
  }
  return {};
}

template <template <class> class Pass, class Kernel>
std::string plan_on_device(ApvScan& scan, Kernel kernel) {
  Device device{};
  std::string why = find_device(device);
  if (why.empty()) why = make_plan<Pass, kWarpsOnDevice>(scan, device);
  if (why.empty()) why = check_occupancy(kernel, scan, device);
  return why;
}

template <template <class> class Pass, class Kernel>
std::string launch_on_device(const ApvScan& scan, Kernel kernel, void* stream) {
  auto plan = offsets_of<Pass, kWarpsOnDevice>(scan, static_cast<int>(scan.blocks));
  ApvScan copy = scan;
  void* arguments[] = {&copy, &plan};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemsetAsync(scan.workspace, 0, plan.zeroed, on);
  if (error == cudaSuccess) {
    error = cudaLaunchCooperativeKernel(kernel, dim3(scan.blocks), dim3(32 * kWarpsOnDevice), arguments,
                                        scan.shared_bytes, on);
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return failure("launching the kernel", error);
}

inline const char* keep_text(std::string text) {
  static thread_local std::string kept;
  kept = std::move(text);
  return kept.empty() ? nullptr : kept.c_str();
}

}  // namespace apv_fast::cuda
