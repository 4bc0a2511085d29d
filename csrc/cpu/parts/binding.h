// What the bind.cpp files have in common. Python hands over addresses of tensors that it has checked (0: none), sizes, and
// the names of dtypes and instruction sets. Whatever is wrong is a std::invalid_argument, Python's ValueError.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "isa.h"
#include "kernel.h"
#include "threads.h"
#include "workspace.h"

namespace apv_fast {

using Address = uintptr_t;
using Addresses = std::map<std::string, Address>;

template <class Pointer = void*>
Pointer pointer(Address address) {
  return reinterpret_cast<Pointer>(address);
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Whether a table has that entry.
template <class Entry>
bool there(const Entry&) {
  return true;
}

template <class Problem>
bool there(const Function<Problem>& function) {
  return function != nullptr;
}

template <class Problem>
bool there(const Pass<Problem>& pass) {
  return pass.run != nullptr;
}

// The table's entry for a dtype; an error names `op`.
template <class Entry>
const Entry& of_dtype(const ByDtype<Entry>& table, const std::string& dtype, const char* op) {
  const Entry* const entry = dtype == "float32"    ? &table.float32
                             : dtype == "float64"  ? &table.float64
                             : dtype == "bfloat16" ? &table.bfloat16
                                                   : nullptr;
  if (entry != nullptr && there(*entry)) return *entry;
  throw std::invalid_argument(std::string(op) + ": dtype '" + dtype + "' is not supported here");
}

// Throws std::bad_alloc.
template <class Problem>
void run(const Pass<Problem>& pass, const Problem& problem) {
  const Workspace memory(pass.bytes(problem));
  pass.run(problem, memory.data());
}

// Threads for an op that reads and writes each of so many numbers once.
inline int threads_for(int64_t numbers, int requested) {
  constexpr int64_t kGrain = 16384;  // numbers that are worth a thread
  const int64_t most = numbers / kGrain + 1;
  return usable_threads(requested < most ? requested : int(most));
}

// Fields of a structure set by name, as keyword arguments would be. Each value is taken once; one
// that is left is an error.
template <class Value>
class Fields {
 public:
  Fields(std::string op, std::map<std::string, Value> values) : op_(std::move(op)), values_(std::move(values)) {}

  // Sets `field` if there is a value of that name: to an address if it is a pointer.
  template <class Field>
  void set(const std::string& name, Field& field) {
    const auto value = values_.find(name);
    if (value == values_.end()) return;
    if constexpr (std::is_pointer_v<Field>) {
      field = reinterpret_cast<Field>(value->second);
    } else {
      field = static_cast<Field>(value->second);
    }
    values_.erase(value);
  }

  void done() const {
    if (values_.empty()) return;
    throw std::invalid_argument(op_ + ": unknown field '" + values_.begin()->first + "'");
  }

 private:
  std::string op_;
  std::map<std::string, Value> values_;
};

}  // namespace apv_fast
