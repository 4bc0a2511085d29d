// Which instruction sets this build has code for and this CPU can run.
//
// A file that `add_isa` in CMakeLists.txt lists is compiled once for each of them, into a namespace of that name, and
// leaves there one table of functions. For a table `const Table functions` such a part's header says
//     APV_FAST_FOR_EACH_ISA(extern const Table functions;)
// and who calls it picks with APV_FAST_PICK(isa, functions).
#pragma once

#include <string>
#include <vector>

// For members of what kernels are given: out of line, each instruction set's object file would have a copy of its own, of
// which the linker keeps any.
#define APV_FAST_INLINE __attribute__((always_inline)) inline

namespace apv_fast {

enum class Isa { scalar, avx2, avx512, avx512bf16 };

// Names, the fastest first; "scalar" (portable code for the architecture's baseline) is always the last.
const std::vector<std::string>& supported_isas();

// The one in use: what APV_FAST_CPU_ISA in the environment names, else the fastest. Called with Python's lock held, as
// Python's writing to the environment is. Throws std::invalid_argument if that one is unknown or cannot run here.
Isa isa_in_use();

std::string name_of(Isa isa);

// Whether the CPU multiplies bfloat16 in tiles (AMX), as oneDNN then does; our kernels do not use it.
bool has_amx();

#if defined(APV_FAST_X86)

template <class Table>
const Table& pick(Isa isa, const Table& scalar, const Table& avx2, const Table& avx512, const Table& avx512bf16) {
  switch (isa) {
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512bf16: return avx512bf16;
    default: return scalar;
  }
}

// clang-format off
#define APV_FAST_FOR_EACH_ISA(...)      \
  namespace scalar { __VA_ARGS__ }      \
  namespace avx2 { __VA_ARGS__ }        \
  namespace avx512 { __VA_ARGS__ }      \
  namespace avx512bf16 { __VA_ARGS__ }
// clang-format on
#define APV_FAST_PICK(isa, table) \
  ::apv_fast::pick(isa, scalar::table, avx2::table, avx512::table, avx512bf16::table)

#else

#define APV_FAST_FOR_EACH_ISA(...) \
  namespace scalar { __VA_ARGS__ }
#define APV_FAST_PICK(isa, table) (static_cast<void>(isa), scalar::table)

#endif

}  // namespace apv_fast
