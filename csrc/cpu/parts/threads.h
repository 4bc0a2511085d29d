// How many threads an op may use.
#pragma once

namespace apv_fast {

// `requested`, at least 1. In a process forked from one that loaded this module it is 1: OpenMP's threads do not survive
// a fork, and a parallel region there would wait for them for ever.
int usable_threads(int requested);

}  // namespace apv_fast
