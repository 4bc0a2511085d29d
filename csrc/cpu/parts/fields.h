// Fields of a structure set by name, as keyword arguments from Python would be.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace apv_fast {

// Values by name; each is taken once, and a name that is left is an error.
template <class Value>
class Fields {
 public:
  Fields(std::string op, std::map<std::string, Value> values) : op_(std::move(op)), values_(std::move(values)) {}

  // Sets `field` if there is a value of that name: to an address if it is a pointer.
  template <class Field>
  void set(const std::string& name, Field& field) {
    const auto found = values_.find(name);
    if (found == values_.end()) return;
    if constexpr (std::is_pointer_v<Field>) {
      field = reinterpret_cast<Field>(found->second);
    } else {
      field = static_cast<Field>(found->second);
    }
    values_.erase(found);
  }

  // Throws std::invalid_argument if there is a value that no field took.
  void done() const {
    if (values_.empty()) return;
    throw std::invalid_argument(op_ + ": unknown field '" + values_.begin()->first + "'");
  }

 private:
  std::string op_;
  std::map<std::string, Value> values_;
};

}  // namespace apv_fast
