#include "isa.h"

#include <algorithm>
#include <stdexcept>

#if defined(APV_FAST_X86)
#include <cpuid.h>
#endif

namespace apv_fast {
namespace {

std::vector<std::string> ask_the_cpu() {
  std::vector<std::string> isas;
#if defined(APV_FAST_X86)
  // These ask the operating system too: it must save the wide registers. The flags are those of CMakeLists.txt.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) isas.push_back("avx512bf16");
  if (avx512) isas.push_back("avx512");
  if (avx2) isas.push_back("avx2");
#endif
  isas.push_back("scalar");
  return isas;
}

}  // namespace

const std::vector<std::string>& supported_isas() {
  static const std::vector<std::string> isas = ask_the_cpu();
  return isas;
}

bool has_amx() {
#if defined(APV_FAST_X86)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmxBf16 = 1u << 22;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16) != 0;
#else
  return false;
#endif
}

Isa isa_of(const std::string& name) {
  const std::vector<std::string>& supported = supported_isas();
  if (std::find(supported.begin(), supported.end(), name) == supported.end()) {
    throw std::invalid_argument("instruction set '" + name + "' cannot be used here");
  }
  if (name == "avx512bf16") return Isa::avx512bf16;
  if (name == "avx512") return Isa::avx512;
  return name == "avx2" ? Isa::avx2 : Isa::scalar;
}

}  // namespace apv_fast
