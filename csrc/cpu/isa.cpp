#include "isa.h"

#include <algorithm>
#include <stdexcept>

namespace apv_fast {

std::vector<std::string> supported_isas() {
  std::vector<std::string> isas;
#if defined(APV_FAST_X86)
  // These ask the operating system too: it must save the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f")) isas.push_back("avx512");
  if (avx2) isas.push_back("avx2");
#endif
  isas.push_back("scalar");
  return isas;
}

template <class Real>
const Scan<Real>& scan_for(const std::string& isa) {
  const std::vector<std::string> supported = supported_isas();
  if (std::find(supported.begin(), supported.end(), isa) == supported.end()) {
    throw std::invalid_argument("instruction set '" + isa + "' cannot be used here");
  }
  constexpr bool single = sizeof(Real) == sizeof(float);
#if defined(APV_FAST_X86)
  if constexpr (single) {
    if (isa == "avx512") return avx512::scan_float;
    if (isa == "avx2") return avx2::scan_float;
  } else {
    if (isa == "avx512") return avx512::scan_double;
    if (isa == "avx2") return avx2::scan_double;
  }
#endif
  if constexpr (single) {
    return scalar::scan_float;
  } else {
    return scalar::scan_double;
  }
}

template const Scan<float>& scan_for<float>(const std::string&);
template const Scan<double>& scan_for<double>(const std::string&);

}  // namespace apv_fast
