#include "rssm_imagine.h"

#include <stdexcept>

#include "../parts/threads.h"
#include "../parts/workspace.h"

namespace apv_fast {
namespace {

const ImagineFunctions& functions_of(const ImagineTable& table, const std::string& dtype) {
  if (dtype == "float32") return table.float32;
  if (dtype == "float64") return table.float64;
  if (dtype == "bfloat16") return table.bfloat16;
  throw std::invalid_argument("imagine: dtype '" + dtype + "' is not supported");
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(std::string("imagine: ") + message);
}

}  // namespace

void imagine(const ImagineProblem& problem, bool backward, const std::string& dtype, const std::string& isa) {
  ImagineProblem p = problem;
  require(p.steps >= 1 && p.rows >= 0 && p.deter >= 1 && p.hidden >= 1 && p.stoch >= 1, "sizes must be at least 1");
  require(p.discrete >= 0 && p.actions >= 0, "sizes must not be negative");
  require(p.inputs >= p.mixed() + p.actions, "img_in_weight must have a column a number of stoch and action");
  require(p.layers >= 0 && p.layers <= kMostLayers, "an actor has at most 16 hidden layers");
  p.threads = usable_threads(p.threads);
  const Isa chosen = isa_of(isa);
  const ImagineTable& table =
      backward ? APV_FAST_PICK(chosen, imagine_backward) : APV_FAST_PICK(chosen, imagine_forward);
  const ImagineFunctions& functions = functions_of(table, dtype);
  const Workspace memory(functions.bytes(p));
  functions.run(p, static_cast<char*>(memory.data()));
}

}  // namespace apv_fast
