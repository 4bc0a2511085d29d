// What a launch needs, decided on the host from what the device has.
#pragma once

#include <string>

#include "backward.h"
#include "forward.h"

namespace apv_fast::cuda {

constexpr int kWarpsOnDevice = 8;  // a block: 255 registers a thread, and few partial sums to add up

struct Device {
  int blocks;        // that run at the same time: one a multiprocessor
  int shared_bytes;  // that one block may have
};

// Row tiles of 16 that a launch has: 1, 2 or 4.
inline int row_tiles(int64_t batch) { return batch <= 16 ? 1 : batch <= 32 ? 2 : 4; }

template <class X>
struct ForwardPass {
  using Plan = ForwardPlan;
  using Shares = ForwardShares;
  static Plan plan(const Sizes& n, int blocks) { return plan_forward<X>(n, blocks); }
  static int last_tiles(const Sizes& n) { return n.stats_tiles(); }
};

template <class X>
struct BackwardPass {
  using Plan = BackwardPlan;
  using Shares = BackwardShares;
  static Plan plan(const Sizes& n, int blocks) { return plan_backward<X>(n, blocks); }
  static int last_tiles(const Sizes& n) { return n.groups(); }
};

// The offsets of a pass with this many warps a block, for the batch's shape.
template <template <class> class Pass, int WARPS>
typename Pass<Shape<WARPS, 1>>::Plan offsets_of(const ApvScan& scan, int blocks) {
  const Sizes n(scan);
  switch (row_tiles(scan.batch)) {
    case 1:
      return Pass<Shape<WARPS, 1>>::plan(n, blocks);
    case 2:
      return Pass<Shape<WARPS, 2>>::plan(n, blocks);
    default:
      return Pass<Shape<WARPS, 4>>::plan(n, blocks);
  }
}

// Fills blocks, shared_bytes and workspace_bytes. Returns why it cannot be done, or nothing.
template <template <class> class Pass, int WARPS>
std::string make_plan(ApvScan& scan, const Device& device) {
  using Shares = typename Pass<Shape<WARPS, 1>>::Shares;
  const Sizes n(scan);
  if (scan.batch < 1 || scan.batch > kMaxRows) return "a launch takes 1 to 64 rows, not " + std::to_string(scan.batch);
  int blocks = max(max(n.deter_tiles(), n.hidden_tiles()), Pass<Shape<WARPS, 1>>::last_tiles(n));
  blocks = min(blocks, device.blocks);
  const auto offsets = offsets_of<Pass, WARPS>(scan, blocks);
  if (offsets.shared_weights > device.shared_bytes) {
    return "its state takes " + std::to_string(offsets.shared_weights) +
           " bytes of shared memory a block, and there are " + std::to_string(device.shared_bytes);
  }
  const int begin = static_cast<int>(offsets.shared_weights / static_cast<int64_t>(sizeof(Quad)));
  int end = begin;  // of what the block that holds most has, if everything is resident
  for (int b = 0; b < blocks; ++b) end = max(end, Shares(n, Division{b, blocks, begin, 1 << 28, 0}).rest.shared);
  const int limit = device.shared_bytes / static_cast<int>(sizeof(Quad));
  scan.blocks = blocks;
  scan.shared_bytes = int64_t{min(end, limit)} * sizeof(Quad);
  scan.workspace_bytes = offsets.weights;
  if (end > limit) {  // some tiles are read through L2 at every step
    scan.workspace_bytes += Shares(n, Division{0, blocks, begin, limit, 0}).rest.workspace * sizeof(Quad);
  }
  return {};
}

}  // namespace apv_fast::cuda
