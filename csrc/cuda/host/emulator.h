// A GPU in miniature, for tests: runs a kernel's source on the CPU, every CUDA thread as a fiber of its own.
//
// A fiber runs until it waits: for the other lanes of its warp (shuffles, mma), for its block, or for a counter. What
// runs next depends on a seed: by default warps have fixed random ranks and the first that can run does, so that one
// block runs as far ahead of the others as the barriers let it; "mixed" draws anew each time. So a missing barrier
// shows, and shared memory begins as NaN. Not emulated: the order in which writes become visible, and time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace apv_fast::emulator {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 96 * 1024;

struct Options {
  int blocks = 4;              // that the imagined GPU runs at the same time
  int shared_bytes = 1 << 16;  // of one block
  uint64_t seed = 0;
  bool shuffle = false;
  int fault = -1;  // what a kernel is told to leave out
};

// What the lanes of a warp bring to an exchange; the other half is read while the next exchange fills this one.
struct Exchange {
  uint32_t words[2][kWarpSize][10];
  int operation[kWarpSize];
  int arrived = 0;
  uint64_t round = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block, thread;
};

class Grid {
 public:
  static Grid*& current() {
    static thread_local Grid* grid = nullptr;
    return grid;
  }

  Grid(const Options& options, int blocks, int threads, std::function<void()> kernel)
      : options(options), blocks(blocks), threads(threads), kernel_(std::move(kernel)), random_(options.seed) {
    const int warps = blocks * threads / kWarpSize;
    exchanges_.resize(warps);
    arrived_.assign(blocks, 0);
    alive_ = blocks * threads;
    for (int b = 0; b < blocks; ++b) {  // all bits set: NaN in every type
      memory_.emplace_back(new uint64_t[options.shared_bytes / 8 + kGuard]);
      std::memset(memory_.back().get(), 0xff, options.shared_bytes + kGuard * 8);
    }
    for (int w = 0; w < warps; ++w) rank_.push_back(random_());
    for (int b = 0; b < blocks; ++b) block_rank_.push_back(random_());
    fibers_.resize(alive_);
    for (int i = 0; i < alive_; ++i) prepare(i);
  }

  // Runs to the end. Throws if no fiber can go on, or if a block wrote past its shared memory.
  void run() {
    current() = this;
    while (alive_ > 0) {
      if (ready_.empty()) throw std::runtime_error("deadlock: every thread waits");
      const auto first = ready_.begin();
      running = std::get<2>(*first);
      ready_.erase(first);
      swapcontext(&scheduler_, &fibers_[running].context);
      if (!error_.empty()) throw std::runtime_error(error_);
    }
    current() = nullptr;
    for (const auto& memory : memory_) {
      for (int i = 0; i < kGuard; ++i) {
        if (memory[options.shared_bytes / 8 + i] != ~uint64_t{0}) throw std::runtime_error("write past shared memory");
      }
    }
  }

  Fiber& fiber() { return fibers_[running]; }
  char* memory() { return reinterpret_cast<char*>(memory_[fiber().block].get()); }

  void sync_block() {
    const int block = fiber().block;
    if (++arrived_[block] < threads) return wait();
    arrived_[block] = 0;
    for (int i = 0; i < threads; ++i) {
      if (block * threads + i != running) wake(block * threads + i);
    }
  }

  // Gives `words` to the other lanes and returns everybody's, which stay valid until this lane's next exchange.
  const uint32_t (*exchange(int operation, const uint32_t* words, int count))[10] {
    const int lane = fiber().thread % kWarpSize, first = running - lane;
    Exchange& x = exchanges_[running / kWarpSize];
    const uint64_t round = x.round;
    std::memcpy(x.words[round % 2][lane], words, count * sizeof(uint32_t));
    x.operation[lane] = operation;
    if (++x.arrived < kWarpSize) {
      wait();
    } else {
      x.arrived = 0;
      ++x.round;
      for (int i = 0; i < kWarpSize; ++i) {
        if (x.operation[i] != operation) error_ = "lanes of a warp meet in different operations";
        if (first + i != running) wake(first + i);
      }
    }
    return x.words[round % 2];
  }

  void add(uint32_t* counter) {
    ++*counter;
    for (auto it = waiting_.begin(); it != waiting_.end();) {
      const auto& [address, target, index] = *it;
      if (address == counter && static_cast<int32_t>(*counter - target) >= 0) {
        wake(index);
        it = waiting_.erase(it);
      } else {
        ++it;
      }
    }
  }

  void wait_for(const uint32_t* counter, uint32_t target) {
    if (static_cast<int32_t>(*counter - target) >= 0) return;
    waiting_.emplace_back(counter, target, running);
    wait();
  }

  const Options options;
  const int blocks, threads;
  int running = 0;
  std::map<size_t, int64_t> loads;  // of weights, by their bytes

 private:
  static constexpr int kGuard = 64;

  void prepare(int index) {
    Fiber& fiber = fibers_[index];
    fiber.block = index / threads;
    fiber.thread = index % threads;
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Grid::enter, 0);
    wake(index);
  }

  static void enter() {
    Grid& grid = *current();
    try {
      grid.kernel_();
    } catch (const std::exception& error) {
      grid.error_ = error.what();
    }
    --grid.alive_;
    grid.wait();
  }

  void wait() { swapcontext(&fibers_[running].context, &scheduler_); }

  void wake(int index) {
    const uint64_t draw = options.shuffle ? random_() : 0;
    const uint64_t block = options.shuffle ? draw : block_rank_[index / threads];
    ready_.emplace(block, options.shuffle ? 0 : rank_[index / kWarpSize], index);
  }

  std::function<void()> kernel_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<std::unique_ptr<uint64_t[]>> memory_;
  std::vector<Exchange> exchanges_;
  std::vector<int> arrived_;
  std::vector<uint64_t> rank_, block_rank_;
  std::set<std::tuple<uint64_t, uint64_t, int>> ready_;  // block's rank, warp's rank, fiber
  std::vector<std::tuple<const uint32_t*, uint32_t, int>> waiting_;
  ucontext_t scheduler_;
  std::string error_;
  int alive_;
};

}  // namespace apv_fast::emulator

namespace apv_fast::cuda {

inline emulator::Grid& grid() { return *emulator::Grid::current(); }

inline int thread() { return grid().fiber().thread; }
inline int lane() { return thread() % emulator::kWarpSize; }
inline int warp() { return thread() / emulator::kWarpSize; }
inline int block() { return grid().fiber().block; }
inline int blocks() { return grid().blocks; }
inline void sync_threads() { grid().sync_block(); }
inline char* shared_memory() { return grid().memory(); }
inline bool fault(int which) { return grid().options.fault == which; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class T>
T load_fresh(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) throw std::runtime_error("load from a misaligned address");
  return *at;
}

template <class T>
T load_whole(const T* at) {
  ++grid().loads[sizeof(T)];
  return load_fresh(at);
}

template <class T>
T load_fresh_if(bool some, const T* at) {
  return some ? load_fresh(at) : T{};
}

inline float shuffle_xor(float x, int mask) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  const auto* all = grid().exchange(mask, &word, 1);
  std::memcpy(&x, &all[lane() ^ mask][0], sizeof x);
  return x;
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type", thread by thread.
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  constexpr int kOperation = 1000;
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  const auto* all = grid().exchange(kOperation, words, 6);
  const auto number = [&](int lane, int word, int half) {
    const uint32_t bits = half ? all[lane][word] & 0xffff0000u : all[lane][word] << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  const auto a = [&](int row, int k) { return number(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2); };
  const auto b = [&](int k, int column) { return number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) sum += a(row, k) * b(k, column);
    c[i] = sum;
  }
}

inline void add_release(uint32_t* counter) { grid().add(counter); }
inline void wait_acquire(const uint32_t* counter, uint32_t target) { grid().wait_for(counter, target); }

}  // namespace apv_fast::cuda
