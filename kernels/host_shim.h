// Runs CUDA kernels on the host, so that a machine without a GPU can test them. It implements the part of CUDA that the
// .cu files use, with fibers: every thread of a block is a fiber that runs until it waits for other threads; blocks run
// one after another. A kernel whose result depends on the order of threads is wrong, so the shim has three orders:
// forward and reverse, where a warp runs as far as it can before the next warp starts, and shuffled, where threads run
// in random order from one wait to the next. The shim stops the program where a GPU would hang, refuse or be undefined:
// a partial mask, threads that wait in different places, a wait that never ends, a grid or block that is too large, a
// trap. It needs -fno-strict-aliasing. It cannot find races that none of the orders exposes, and says nothing about
// speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_shim {

enum class Order { kForward, kReverse, kShuffled };

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

// Place where fibers wait for each other: the last of `size` fibers to arrive opens the gate by starting a new
// generation. Values left at a gate stay readable until the generation after the next one opens, and no fiber is that
// far behind.
struct Gate {
  uint64_t generation = 0;
  unsigned size = 0, arrived = 0;
  int site = 0;  // source line of the collective that the first fiber arrived at
  uint64_t values[2][kWarpSize] = {};
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const Gate* gate = nullptr;  // the fiber waits here until the generation differs from the one at its arrival
  uint64_t generation = 0;
  bool done = false;
};

inline Order order = Order::kForward;
inline std::mt19937 generator;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;  // kept between launches to reuse their stacks
inline Fiber* current = nullptr;
inline Gate block_gate;
inline std::vector<Gate> warp_gates;
inline const std::function<void()>* kernel = nullptr;

[[noreturn]] inline void stop(const char* why, int site) {
  std::fprintf(stderr, "host_shim: block %u, thread %u, line %d: %s\n", blockIdx.x, threadIdx.x, site, why);
  std::abort();
}

inline void wait(Gate& gate, int site) {
  if (gate.arrived == 0) gate.site = site;
  if (gate.site != site) stop("threads wait for each other in different places", site);
  current->gate = &gate;
  current->generation = gate.generation;
  if (++gate.arrived == gate.size) {
    gate.arrived = 0;
    ++gate.generation;
  }
  swapcontext(&current->context, &scheduler);
}

// Values of all lanes of the warp, as 32 words.
inline const uint64_t* exchange(unsigned mask, uint64_t value, int site) {
  if (mask != 0xffffffffu) stop("the mask leaves lanes out", site);
  Gate& gate = warp_gates[threadIdx.x / kWarpSize];
  uint64_t* values = gate.values[gate.generation % 2];
  values[threadIdx.x % kWarpSize] = value;
  wait(gate, site);
  return values;
}

inline void enter_fiber() {
  (*kernel)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void start_fiber(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  fiber.gate = nullptr;
  fiber.done = false;
  makecontext(&fiber.context, enter_fiber, 0);
}

inline std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> ids(count);
  std::iota(ids.begin(), ids.end(), 0u);
  if (order == Order::kReverse) std::reverse(ids.begin(), ids.end());
  if (order == Order::kShuffled) std::shuffle(ids.begin(), ids.end(), generator);
  return ids;
}

inline bool can_run(const Fiber& fiber) {
  return !fiber.done && (fiber.gate == nullptr || fiber.gate->generation != fiber.generation);
}

inline bool resume(unsigned thread) {
  if (!can_run(fibers[thread])) return false;
  threadIdx = dim3(thread);
  current = &fibers[thread];
  swapcontext(&scheduler, &current->context);
  return true;
}

// Runs a warp until every lane has returned or waits for other warps.
inline bool resume_warp(unsigned warp) {
  bool moved = false;
  for (bool again = true; again; moved = moved || again) {
    again = false;
    for (unsigned lane : in_order(kWarpSize)) again = resume(warp * kWarpSize + lane) || again;
  }
  return moved;
}

inline void run_block(unsigned threads) {
  block_gate = Gate{};
  block_gate.size = threads;
  warp_gates.assign(threads / kWarpSize, Gate{});
  for (Gate& gate : warp_gates) gate.size = kWarpSize;
  for (unsigned t = 0; t < threads; ++t) start_fiber(fibers[t]);
  for (bool moved = true; moved;) {
    moved = false;
    if (order == Order::kShuffled)
      for (unsigned t : in_order(threads)) moved = resume(t) || moved;
    else
      for (unsigned w : in_order(threads / kWarpSize)) moved = resume_warp(w) || moved;
  }
  for (unsigned t = 0; t < threads; ++t)
    if (!fibers[t].done) stop("threads wait for some that have returned", fibers[t].gate->site);
}

inline void run(dim3 grid, unsigned threads, const std::function<void()>& body) {
  if (threads % kWarpSize != 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535) stop("launch refused", 0);
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  kernel = &body;
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned b : in_order(grid.x * grid.y * grid.z)) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block(threads);
  }
}

template <typename T>
uint64_t to_word(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace host_shim

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

using std::max;
using std::min;

enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

struct __nv_bfloat16 {
  uint16_t bits;
};
using __half = _Float16;

inline float __uint_as_float(unsigned bits) { return host_shim::from_word<float>(bits); }
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(host_shim::to_word(value)); }
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half(float value) { return static_cast<__half>(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned rounded = value == value ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fff0000;  // ties to even
  return {static_cast<uint16_t>(rounded >> 16)};
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint4 __ldca(const uint4* from) { return *from; }
inline void __stwb(uint4* to, uint4 value) { *to = value; }

[[noreturn]] inline void __trap() {
  std::fflush(nullptr);
  std::abort();
}

inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* to, int value) { return std::exchange(*to, *to + value); }

// The default argument is the line of the call, because threads must wait for each other in the same place.
inline void __syncthreads(int site = __builtin_LINE()) { host_shim::wait(host_shim::block_gate, site); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int site = __builtin_LINE()) {
  return host_shim::from_word<T>(host_shim::exchange(mask, host_shim::to_word(value), site)[lane]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int site = __builtin_LINE()) {
  return __shfl_sync(mask, value, (threadIdx.x % host_shim::kWarpSize) ^ offset, site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int offset, int site = __builtin_LINE()) {
  const int lane = threadIdx.x % host_shim::kWarpSize;
  return __shfl_sync(mask, value, lane < offset ? lane : lane - offset, site);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, int site = __builtin_LINE()) {
  const uint64_t* values = host_shim::exchange(mask, value, site);
  return static_cast<unsigned>(*std::max_element(values, values + host_shim::kWarpSize));
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned value, int site = __builtin_LINE()) {
  const uint64_t* values = host_shim::exchange(mask, value, site);
  return static_cast<unsigned>(*std::min_element(values, values + host_shim::kWarpSize));
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, int site = __builtin_LINE()) {
  const uint64_t* values = host_shim::exchange(mask, host_shim::to_word(value), site);
  unsigned peers = 0;
  for (unsigned lane = 0; lane < host_shim::kWarpSize; ++lane)
    peers |= static_cast<unsigned>(values[lane] == host_shim::to_word(value)) << lane;
  return peers;
}
