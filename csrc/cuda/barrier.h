// A barrier of the whole grid: everything that any thread wrote before arrive() is visible to every thread after
// wait(). Between the two a block may do what needs nothing from the others.
#pragma once

#include "device.h"

namespace apv_fast::cuda {

// A counter that only grows: zero when the kernel begins, one more for every block at every barrier. No reset, so no
// second round can be confused with the first; it may wrap.
struct Barrier {
  uint32_t* counter;
  uint32_t target;

  APV_DEVICE void arrive() {
    sync_threads();
    if (thread() == 0) add_release(counter);
    target += blocks();
  }

  APV_DEVICE void wait(int phase) const {
    if (thread() == 0 && !fault(phase)) wait_acquire(counter, target);
    sync_threads();
  }
};

}  // namespace apv_fast::cuda
