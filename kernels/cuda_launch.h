// The ops on a GPU as plain functions: the binding calls them, the .cu files define them. Neither side needs the
// other's headers: this file has no torch, and its first part has no CUDA.
#pragma once

#include "arguments.h"

namespace eve_ds {

// Number of tokens that one block of the backward of dispatch sums for the gradient of the embedding. It is smaller
// than kChunkTokens, which would give fewer blocks than a GPU can run at once.
constexpr int64_t kEmbeddingTokens = 32;

inline int64_t num_embedding_chunks(int64_t tokens) { return (tokens + kEmbeddingTokens - 1) / kEmbeddingTokens; }

// Each function queues its kernels on the CUDA stream and returns at once: null, or the error text of a launch.
// Pointers refer to memory of the current device. Ids are used without a check; see below.
const char* launch_route(const Route& args, void* stream);
const char* launch_route_backward(const RouteBackward& args, void* stream);
const char* launch_dispatch(const Dispatch& args, Dtype dtype, void* stream);
const char* launch_dispatch_backward(const DispatchBackward& args, Dtype dtype, void* stream);
const char* launch_combine(const Combine& args, Dtype dtype, void* stream);
const char* launch_combine_backward(const CombineBackward& args, Dtype dtype, void* stream);
const char* launch_cross_entropy(const CrossEntropy& args, Dtype dtype, void* stream);
const char* launch_pixel_loss(const PixelLoss& args, Dtype dtype, void* stream);
const char* launch_pixel_loss_backward(const PixelLossBackward& args, Dtype dtype, void* stream);
const char* launch_quick_gelu(const QuickGelu& args, Dtype dtype, void* stream);
const char* launch_grouped_bias(const GroupedBias& args, Dtype dtype, void* stream);
const char* launch_grouped_bias_backward(const GroupedBiasBackward& args, Dtype dtype, void* stream);

// Each function ends the program, with a message that names the argument, if an id is not in [lowest, end), or if ends
// of rows do not ascend from 0 to `rows`.
const char* launch_check_ids(
    const char* argument, const int64_t* ids, int64_t count, int64_t lowest, int64_t end, void* stream);
const char* launch_check_ends(const int32_t* ends, int64_t experts, int64_t rows, void* stream);

}  // namespace eve_ds

// Shared by the .cu files. With EVE_HOST_SHIM they run on the host (host_shim.h).
#if defined(__CUDACC__) || defined(EVE_HOST_SHIM)

#include <cstring>

#if defined(EVE_HOST_SHIM)
#include "host_shim.h"
#define EVE_LAUNCH(kernel, grid, threads, stream, ...) host_shim::run(grid, threads, [&] { kernel(__VA_ARGS__); })
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define EVE_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace eve_ds {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;  // widest load of one thread

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }

// Index of this warp among all warps of the grid.
__device__ __forceinline__ int64_t global_warp_id() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp_id();
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ void round_to(float& to, float value) { to = value; }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float value) { to = __float2bfloat16(value); }
__device__ __forceinline__ void round_to(__half& to, float value) { to = __float2half(value); }

// One value of a row, or N adjacent values of 16 bytes or more, aligned to 16 bytes. The intrinsics move 16 bytes at
// once, while a copy of such a wide struct may compile to several stores.
template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  T values[N];
  if constexpr (N == 1) {
    values[0] = *from;
  } else {
    uint4 pieces[sizeof values / kVectorBytes];
#pragma unroll
    for (unsigned i = 0; i < sizeof values / kVectorBytes; ++i)
      pieces[i] = __ldca(reinterpret_cast<const uint4*>(from) + i);
    memcpy(values, pieces, sizeof values);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(values[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  T values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) round_to(values[i], from[i]);
  if constexpr (N == 1) {
    *to = values[0];
  } else {
    uint4 piece;
    static_assert(sizeof values == sizeof piece);
    memcpy(&piece, values, sizeof piece);
    __stwb(reinterpret_cast<uint4*>(to), piece);
  }
}

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Reduces over a warp as a tree, so always in the same order; every lane gets the result.
template <typename Operation, typename T>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = operation(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce(value, Sum{});
}

// Queues one kernel; a grid without blocks does nothing.
template <typename... Parameters, typename... Arguments>
const char* launch(
    void (*kernel)(Parameters...), dim3 grid, int threads, [[maybe_unused]] void* stream,
    const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  EVE_LAUNCH(kernel, grid, threads, stream, arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  return static_cast<unsigned>((items + items_per_block - 1) / items_per_block);
}

// Instantiation of a kernel on rows: a dtype, and the number of values that a thread moves at once.
template <typename T, int N>
struct RowType {
  using Value = T;
  static constexpr int kValues = N;
};

// Whether consecutive rows of this many bytes, starting at each of these addresses, are all aligned to 16 bytes.
template <typename... Pointers>
bool rows_are_aligned(int64_t row_bytes, const Pointers*... rows) {
  return row_bytes % kVectorBytes == 0 && ((reinterpret_cast<uintptr_t>(rows) % kVectorBytes == 0) && ...);
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

template <typename T, typename Launch>
const char* with_alignment(bool aligned, const Launch& launch) {
  return aligned ? launch(RowType<T, kVectorBytes / sizeof(T)>{}) : launch(RowType<T, 1>{});
}

// Calls `launch` with the RowType for a dtype and an alignment.
template <typename Launch>
const char* with_row_type(Dtype dtype, bool aligned, const Launch& launch) {
  switch (dtype) {
    case Dtype::kBFloat16: return with_alignment<__nv_bfloat16>(aligned, launch);
    case Dtype::kFloat16: return with_alignment<__half>(aligned, launch);
    default: return with_alignment<float>(aligned, launch);
  }
}

}  // namespace eve_ds

#endif
