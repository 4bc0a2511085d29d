#include "threads.h"

#include <unistd.h>

namespace apv_fast {
namespace {

const pid_t kLoadedIn = getpid();

}  // namespace

int usable_threads(int requested) { return getpid() == kLoadedIn && requested > 1 ? requested : 1; }

}  // namespace apv_fast
