#include "rssm_observe.h"

#include <stdexcept>

#include "../parts/threads.h"
#include "../parts/workspace.h"

namespace apv_fast {
namespace {

const ScanFunctions& functions_of(const ScanTable& table, const std::string& dtype) {
  if (dtype == "float32") return table.float32;
  if (dtype == "float64") return table.float64;
  if (dtype == "bfloat16") return table.bfloat16;
  throw std::invalid_argument("rssm_scan: dtype '" + dtype + "' is not supported");
}

void require(const Weight& weight, int64_t rows, int64_t columns, const char* name) {
  if (weight.rows == rows && weight.columns == columns) return;
  throw std::invalid_argument(std::string("rssm_scan: ") + name + " must be [" + std::to_string(rows) + ", " +
                              std::to_string(columns) + "]");
}

}  // namespace

void rssm_scan(const ScanProblem& problem, bool backward, const std::string& dtype, const std::string& isa) {
  ScanProblem p = problem;
  if (p.batch < 1 || p.length < 1 || p.deter < 1 || p.hidden < 1 || p.stoch < 1 || p.discrete < 0) {
    throw std::invalid_argument("rssm_scan: sizes must be at least 1");
  }
  require(p.weight_stoch, p.hidden, p.mixed(), "weight_stoch");
  require(p.weight_gru, 3 * p.deter, p.hidden + p.deter, "weight_gru");
  require(p.weight_obs, p.hidden, p.deter, "weight_obs");
  require(p.weight_dist, p.statistics(), p.hidden, "weight_dist");
  p.threads = usable_threads(p.threads);
  const Isa chosen = isa_of(isa);
  const ScanTable& table = backward ? APV_FAST_PICK(chosen, scan_backward) : APV_FAST_PICK(chosen, scan_forward);
  const ScanFunctions& functions = functions_of(table, dtype);
  const Workspace memory(functions.bytes(p));
  functions.run(p, static_cast<char*>(memory.data()));
}

}  // namespace apv_fast
