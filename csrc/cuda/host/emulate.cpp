// The library's interface on the emulator, for tests: the same kernels on addresses of the CPU's memory.

#include "../api.h"
#include "../plan.h"

namespace apv_fast::cuda {
namespace {

constexpr int kWarps = 2;  // of an emulated block

emulator::Options options;
std::map<size_t, int64_t> loads;  // of the last launch

const char* keep_text(std::string text) {
  static std::string kept;
  kept = std::move(text);
  return kept.empty() ? nullptr : kept.c_str();
}

const char* run(emulator::Grid& grid) {
  try {
    grid.run();
  } catch (const std::exception& error) {
    return keep_text(error.what());
  }
  loads = grid.loads;
  return nullptr;
}

template <template <class> class Pass>
const char* plan_pass(ApvScan& scan) {
  return keep_text(make_plan<Pass, kWarps>(scan, Device{options.blocks, options.shared_bytes}));
}

template <template <class> class Pass, class Kernel>
const char* launch(const ApvScan& scan, const Kernel& kernel) {
  const auto plan = offsets_of<Pass, kWarps>(scan, static_cast<int>(scan.blocks));
  std::memset(scan.workspace, 0xff, scan.workspace_bytes);  // what nothing wrote is NaN
  std::memset(scan.workspace, 0, plan.zeroed);
  emulator::Options exact = options;
  exact.shared_bytes = static_cast<int>(scan.shared_bytes);
  emulator::Grid grid(exact, static_cast<int>(scan.blocks), 32 * kWarps, [&] { kernel(scan, plan); });
  return run(grid);
}

}  // namespace
}  // namespace apv_fast::cuda

using namespace apv_fast;
using namespace apv_fast::cuda;

APV_EXPORT void apv_emulator(int blocks, int shared_bytes, uint64_t seed, int shuffle, int fault) {
  options = {blocks, shared_bytes, seed, shuffle != 0, fault};
}

// Of the last launch: how many loads of weights had so many bytes.
APV_EXPORT int64_t apv_emulator_loads(int64_t bytes) { return loads[bytes]; }

APV_EXPORT int64_t apv_scan_bytes(void) { return sizeof(ApvScan); }
APV_EXPORT const char* apv_architectures(void) { return "900"; }
APV_EXPORT const char* apv_probe(void) { return nullptr; }
APV_EXPORT const char* apv_plan_forward(ApvScan* scan) { return plan_pass<ForwardPass>(*scan); }
APV_EXPORT const char* apv_plan_backward(ApvScan* scan) { return plan_pass<BackwardPass>(*scan); }

APV_EXPORT const char* apv_forward(const ApvScan* scan, void*) {
  return launch<ForwardPass>(*scan, [](const ApvScan& s, const ForwardPlan& plan) {
    switch (row_tiles(s.batch)) {
      case 1:
        return Forward<Shape<kWarps, 1>>(s, plan).run();
      case 2:
        return Forward<Shape<kWarps, 2>>(s, plan).run();
      default:
        return Forward<Shape<kWarps, 4>>(s, plan).run();
    }
  });
}

APV_EXPORT const char* apv_backward(const ApvScan* scan, void*) {
  return launch<BackwardPass>(*scan, [](const ApvScan& s, const BackwardPlan& plan) {
    switch (row_tiles(s.batch)) {
      case 1:
        return Backward<Shape<kWarps, 1>>(s, plan).run();
      case 2:
        return Backward<Shape<kWarps, 2>>(s, plan).run();
      default:
        return Backward<Shape<kWarps, 4>>(s, plan).run();
    }
  });
}

APV_EXPORT const char* apv_sample(const ApvSample* sample, int backward, void*) {
  using Emulated = Sampler<64>;
  emulator::Grid grid(options, static_cast<int>(Emulated::blocks(*sample)), Emulated::kThreads, [&] {
    const Emulated sampler{*sample};
    backward ? sampler.backward() : sampler.forward();
  });
  return run(grid);
}

// What the library would plan for a GPU: its number of multiprocessors, and the shared memory that a block may have.
APV_EXPORT const char* apv_plan_for(ApvScan* scan, int backward, int multiprocessors, int shared_bytes) {
  const Device device{multiprocessors, shared_bytes};
  return keep_text(backward ? make_plan<BackwardPass, kWarpsOnDevice>(*scan, device)
                            : make_plan<ForwardPass, kWarpsOnDevice>(*scan, device));
}

// The noise of one element, for a comparison with its twin in PyTorch: uniform's bits, Gumbel, normal.
APV_EXPORT void apv_noise(uint64_t seed, uint32_t index, uint32_t* word, float* out) {
  *word = philox(seed, index).first;
  out[0] = gumbel(seed, index);
  out[1] = normal(seed, index);
}
