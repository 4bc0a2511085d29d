// Working memory of one call, aligned to a cache line.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace apv_fast {

class Workspace {
 public:
  // Throws std::bad_alloc.
  explicit Workspace(size_t bytes) : data_(std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment)) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  static constexpr size_t kAlignment = 64;
  void* data_;
};

}  // namespace apv_fast
