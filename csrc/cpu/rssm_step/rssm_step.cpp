#include "rssm_step.h"

#include <memory>
#include <stdexcept>

#include "../parts/threads.h"
#include "../parts/workspace.h"

namespace apv_fast {
namespace {

const StepFunctions& functions_of(const StepTable& table, const std::string& dtype) {
  if (dtype == "float32") return table.float32;
  if (dtype == "float64") return table.float64;
  if (dtype == "bfloat16") return table.bfloat16;
  throw std::invalid_argument("step: dtype '" + dtype + "' is not supported");
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(std::string("step: ") + message);
}

void check(const StepModel& m) {
  require(m.deter >= 1 && m.stoch >= 1 && m.img_in.units >= 1, "sizes must be at least 1");
  require(m.discrete >= 0 && m.actions >= 0 && m.embed >= 0, "sizes must not be negative");
  require(m.inputs >= m.mixed() + m.actions, "img_in_weight must have a column a number of stoch and action");
}

// This thread's working memory, kept from step to step: a few hundred kilobytes.
char* memory_of(size_t bytes) {
  thread_local std::unique_ptr<Workspace> memory;
  thread_local size_t size = 0;
  if (bytes > size || memory == nullptr) {
    memory.reset();
    size = 0;
    memory = std::make_unique<Workspace>(bytes);
    size = bytes;
  }
  return static_cast<char*>(memory->data());
}

}  // namespace

void step(const StepProblem& problem, const std::string& dtype, const std::string& isa) {
  StepProblem p = problem;
  require(p.rows >= 0 && (p.models == 1 || p.models == 2), "there must be one model or two");
  require(p.layers >= 0 && p.layers <= kMostLayers, "an actor has at most 16 hidden layers");
  for (int64_t i = 0; i < p.models; ++i) check(p.model[i]);
  require(p.layers == 0 || p.model[p.models - 1].post.there(), "an actor needs a posterior");
  if (p.rows == 0) return;
  p.threads = usable_threads(p.threads);
  const StepTable& table = APV_FAST_PICK(isa_of(isa), filter_step);
  const StepFunctions& functions = functions_of(table, dtype);
  functions.run(p, memory_of(functions.bytes(p)));
}

}  // namespace apv_fast
