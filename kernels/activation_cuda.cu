// quick_gelu(x) = x * sigmoid(1.702 x) on a GPU, in one pass each for forward and backward: alone, and fused with the
// biases of all experts. The backward sums the bias gradients in the same pass.

#include <cmath>

#include "cuda_launch.h"

namespace eve_ds {

constexpr int kActivationThreads = 256;
constexpr int kActivationWarps = kActivationThreads / kWarp;
constexpr int kRowsAtOnce = 4;  // rows that a warp loads at the same time, to overlap the latencies
constexpr float kSlope = 1.702f;

// If the exponential is infinite, the quotient is 0, which is the correct limit.
__device__ __forceinline__ float gelu_sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-kSlope * x)); }

__device__ __forceinline__ float gelu_slope(float x) {
  const float sigmoid = gelu_sigmoid(x);
  return sigmoid + kSlope * x * sigmoid * (1.0f - sigmoid);
}

template <typename T, int N>
__global__ void quick_gelu_kernel(QuickGelu args) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (first >= args.count) return;
  float x[N], d_out[N], out[N];
  load(static_cast<const T*>(args.x) + first, x);
  if (args.d_out != nullptr) load(static_cast<const T*>(args.d_out) + first, d_out);
#pragma unroll
  for (int i = 0; i < N; ++i)
    out[i] = args.d_out == nullptr ? x[i] * gelu_sigmoid(x[i]) : d_out[i] * gelu_slope(x[i]);
  store(static_cast<T*>(args.out) + first, out);
}

// ---- Fused with the biases of the experts ----

// Expert that a row belongs to; the number of experts if it belongs to none.
__device__ __forceinline__ int expert_of(const int32_t* ends, int64_t experts, int64_t row) {
  int first = 0, last = static_cast<int>(experts);
  while (first < last) {
    const int middle = (first + last) / 2;
    if (ends[middle] <= row) first = middle + 1;
    else last = middle;
  }
  return first;
}

// First of this lane's N columns; blockIdx.y counts blocks of 32 N columns.
template <int N>
__device__ __forceinline__ int64_t first_column() {
  return (static_cast<int64_t>(blockIdx.y) * kWarp + lane_id()) * N;
}

// One warp per kRowsAtOnce rows and 32 N columns. It reads all its input before it writes, so `out` may equal `x`.
template <typename T, int N>
__global__ void __launch_bounds__(kActivationThreads, 4) grouped_bias_kernel(const GroupedBias args) {
  const int64_t first = global_warp_id() * kRowsAtOnce, width = args.width, column = first_column<N>();
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRowsAtOnce), args.rows - first));
  if (column >= width || rows <= 0) return;
  const int64_t filled = args.experts > 0 ? args.ends[args.experts - 1] : 0;
  if (args.bias == nullptr && args.out == args.x && first + rows <= filled) return;  // nothing to add or to clear
  float x[kRowsAtOnce][N] = {};
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r)
    if (r < rows && first + r < filled) load<N>(static_cast<const T*>(args.x) + (first + r) * width + column, x[r]);
  float bias[N] = {};
  int expert = -1;
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    if (r >= rows) return;
    const int64_t row = first + r;
    if (args.bias != nullptr && row < filled && (expert < 0 || row >= args.ends[expert])) {
      expert = expert_of(args.ends, args.experts, row);
      load<N>(static_cast<const T*>(args.bias) + expert * width + column, bias);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = row < filled ? x[r][i] + bias[i] : 0.0f;
      x[r][i] = args.activate ? value * gelu_sigmoid(value) : value;
    }
    store<N>(static_cast<T*>(args.out) + row * width + column, x[r]);
  }
}

// Gradients of the rows [first, end) of one expert; each of the kActivationWarps warps takes one row at a time. Returns
// the sum over this warp's rows in `sums`.
template <typename T, int N>
__device__ __forceinline__ void backward_of_rows(
    const GroupedBiasBackward& args, int64_t column, int64_t first, int64_t end, const float (&bias)[N],
    float (&sums)[N]) {
  for (int64_t row = first + warp_id(); row < end; row += kActivationWarps) {
    const int64_t at = row * args.width + column;
    float gradient[N], x[N];
    load<N>(static_cast<const T*>(args.d_out) + at, gradient);
    if (args.x != nullptr) {
      load<N>(static_cast<const T*>(args.x) + at, x);
#pragma unroll
      for (int i = 0; i < N; ++i) gradient[i] *= gelu_slope(x[i] + bias[i]);
      store<N>(static_cast<T*>(args.d_x) + at, gradient);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += gradient[i];
  }
}

// Adds the warps' column sums in order; the whole block calls it.
template <int N>
__device__ __forceinline__ void write_piece(const float (&sums)[N], int64_t width, float* piece) {
  __shared__ float per_warp[kActivationWarps][kWarp * N];
  __syncthreads();  // no thread reads the sums of the previous piece any more
#pragma unroll
  for (int i = 0; i < N; ++i) per_warp[warp_id()][lane_id() * N + i] = sums[i];
  __syncthreads();
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kWarp * N + threadIdx.x;
  if (threadIdx.x >= kWarp * N || column >= width) return;
  float total = 0.0f;
  for (int w = 0; w < kActivationWarps; ++w) total += per_warp[w][threadIdx.x];
  piece[column] = total;
}

// One block per chunk of rows and 32 N columns; it processes the pieces of the chunk one after another.
template <typename T, int N>
__global__ void __launch_bounds__(kActivationThreads, 4) grouped_bias_backward_kernel(const GroupedBiasBackward args) {
  static_assert(kWarp * N <= kActivationThreads, "one thread per column adds the sums of the warps");
  const int64_t chunk = blockIdx.x, width = args.width, column = first_column<N>();
  const int64_t end = min((chunk + 1) * kChunkRows, args.rows);
  int64_t first = chunk * kChunkRows;
  for (int e = expert_of(args.ends, args.experts, first); e < args.experts && first < end; ++e) {
    const int64_t piece_end = min(end, static_cast<int64_t>(args.ends[e]));
    if (piece_end <= first) continue;  // an expert without rows
    float bias[N] = {}, sums[N] = {};
    if (column < width) {
      if (args.bias != nullptr) load<N>(static_cast<const T*>(args.bias) + e * width + column, bias);
      backward_of_rows<T, N>(args, column, first, piece_end, bias, sums);
    }
    write_piece<N>(sums, width, args.piece_sums + (chunk + e) * width);
    first = piece_end;
  }
  if (args.d_x == nullptr || column >= width) return;
  const float zeros[N] = {};
  for (int64_t row = first + warp_id(); row < end; row += kActivationWarps)
    store<N>(static_cast<T*>(args.d_x) + row * width + column, zeros);
}

// One thread per expert and column; it adds the pieces of the expert in order.
template <typename T>
__global__ void __launch_bounds__(kActivationThreads) add_pieces_kernel(const GroupedBiasBackward args) {
  const int64_t expert = blockIdx.y, column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= args.width) return;
  const int64_t first = expert > 0 ? args.ends[expert - 1] : 0, end = args.ends[expert];
  float total = 0.0f;
  if (end > first)
    for (int64_t chunk = first / kChunkRows; chunk <= (end - 1) / kChunkRows; ++chunk)
      total += args.piece_sums[(chunk + expert) * args.width + column];
  round_to(static_cast<T*>(args.d_bias)[expert * args.width + column], total);
}

// ---- Launches ----

const char* launch_quick_gelu(const QuickGelu& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.count * size_of(dtype), args.x, args.d_out, args.out);
  return with_row_type(dtype, aligned, [&](auto row) {
    constexpr int values = decltype(row)::kValues;
    const auto kernel = quick_gelu_kernel<typename decltype(row)::Value, values>;
    return launch(kernel, blocks_for(args.count, kActivationThreads * values), kActivationThreads, stream, args);
  });
}

const char* launch_grouped_bias(const GroupedBias& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.width * size_of(dtype), args.x, args.bias, args.out);
  return with_row_type(dtype, aligned, [&](auto row) {
    const auto kernel = grouped_bias_kernel<typename decltype(row)::Value, decltype(row)::kValues>;
    const unsigned columns = blocks_for(args.width, kWarp * decltype(row)::kValues);
    const dim3 grid(blocks_for(args.rows, kActivationWarps * kRowsAtOnce), columns);
    return launch(kernel, grid, kActivationThreads, stream, args);
  });
}

const char* launch_grouped_bias_backward(const GroupedBiasBackward& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.width * size_of(dtype), args.d_out, args.x, args.bias, args.d_x);
  const char* error = with_row_type(dtype, aligned, [&](auto row) {
    const auto kernel = grouped_bias_backward_kernel<typename decltype(row)::Value, decltype(row)::kValues>;
    const unsigned columns = blocks_for(args.width, kWarp * decltype(row)::kValues);
    const dim3 grid(static_cast<unsigned>(num_row_chunks(args.rows)), columns);
    return launch(kernel, grid, kActivationThreads, stream, args);
  });
  if (error != nullptr) return error;
  return with_row_type(dtype, false, [&](auto row) {
    const dim3 grid(blocks_for(args.width, kActivationThreads), static_cast<unsigned>(args.experts));
    return launch(add_pieces_kernel<typename decltype(row)::Value>, grid, kActivationThreads, stream, args);
  });
}

}  // namespace eve_ds
