// The threads of one op: one OpenMP region for a whole sequence, a barrier a phase. For files that are compiled once for
// every instruction set, see simd.h.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace apv_fast {
namespace APV_FAST_ISA {
namespace {

// One thread's view of its team.
struct Team {
  int rank, size;

  void barrier() const {
#if defined(_OPENMP)
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
};

// Calls work(Team) on `threads` threads (or fewer, if OpenMP grants fewer). `threads` is usable_threads' answer; `work`
// must not throw.
template <class Work>
inline void run_team(int threads, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  static_cast<void>(threads);
  work(Team{0, 1});
}

struct Range {
  int64_t begin, end;
};

// This thread's part of n items: contiguous, sizes differ by at most one. What a part computes must not depend on it.
inline Range share(int64_t n, const Team& team) {
  return {n * team.rank / team.size, n * (team.rank + 1) / team.size};
}

}  // namespace
}  // namespace APV_FAST_ISA
}  // namespace apv_fast
