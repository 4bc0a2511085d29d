// Which instruction sets this build has code for and this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "knn_scan.h"

namespace apv_fast {

// Names, the fastest first; "scalar" (portable code for the architecture's baseline) is always the last.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument if `isa` is not one of supported_isas().
template <class Real>
const Scan<Real>& scan_for(const std::string& isa);

}  // namespace apv_fast
