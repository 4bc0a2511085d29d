#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(APV_FAST_X86)
#include <cpuid.h>
#endif

namespace apv_fast {
namespace {

using Names = std::vector<std::string>;

constexpr const char* kVariable = "APV_FAST_CPU_ISA";
const Names kNames = {"scalar", "avx2", "avx512", "avx512bf16"};  // in the order of Isa

bool among(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string listed(const Names& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Names ask_the_cpu() {
  Names isas;
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
  static const Names isas = ask_the_cpu();
  return isas;
}

Isa isa_in_use() {
  const char* const wanted = std::getenv(kVariable);
  const std::string name = wanted == nullptr || *wanted == '\0' ? supported_isas().front() : wanted;
  const std::string prefix = std::string(kVariable) + ": ";
  if (!among(kNames, name)) {
    throw std::invalid_argument(prefix + "unknown instruction set '" + name + "'; must be one of: " + listed(kNames));
  }
  if (!among(supported_isas(), name)) {
    throw std::invalid_argument(prefix + "this machine cannot run '" + name + "'; it can run: " + listed(supported_isas()));
  }
  return static_cast<Isa>(std::find(kNames.begin(), kNames.end(), name) - kNames.begin());
}

std::string name_of(Isa isa) { return kNames[static_cast<size_t>(isa)]; }

bool has_amx() {
#if defined(APV_FAST_X86)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmxBf16 = 1u << 22;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16) != 0;
#else
  return false;
#endif
}

}  // namespace apv_fast
