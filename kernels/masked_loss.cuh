// Cross entropy of masked words and squared error of masked pixels on a GPU. Sums are fixed trees, so results repeat
// bit for bit.
#pragma once

#include <cfloat>

#include "cuda_launch.h"

namespace eve_ds {

constexpr int kEntropyWarps = 32;  // warps of the block that works on one row of logits
constexpr int kEntropyThreads = kEntropyWarps * kWarp;
constexpr int kPatchWarps = 8;  // warps per block in kernels that use one warp per patch

struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Reduces over a block; every thread gets the result. Call it once per operation and kernel: a second call could
// overwrite values that the first call still reads.
template <typename Operation>
__device__ __forceinline__ float block_reduce(float value, Operation operation) {
  __shared__ float per_warp[kEntropyWarps];
  value = warp_reduce(value, operation);
  if (lane_id() == 0) per_warp[warp_id()] = value;
  __syncthreads();
  return warp_reduce(per_warp[lane_id()], operation);
}

// ---- Cross entropy ----

template <typename T, int N>
__device__ __forceinline__ void load_logits(const T* logits, const float* bias, float (&values)[N]) {
  load<N>(logits, values);
  if (bias == nullptr) return;
  float added[N];
  load<N>(bias, added);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] += added[i];
}

// One block per row, which it reads twice: first for the largest logit and the sum of exponentials, rescaled whenever a
// larger logit appears, then to write the gradients in place.
template <typename T, int N>
__global__ void __launch_bounds__(kEntropyThreads, 2) cross_entropy_kernel(const CrossEntropy args) {
  const int64_t row = blockIdx.x, vocabulary = args.vocabulary, target = args.target[row];
  T* logits = static_cast<T*>(args.logits) + row * vocabulary;
  const auto bias_at = [&](int64_t v) { return args.bias == nullptr ? nullptr : args.bias + v; };
  float target_logit[1];
  load_logits(logits + target, bias_at(target), target_logit);  // before the logit is overwritten

  float largest = -FLT_MAX, total = 0.0f;  // finite, because the difference of two infinities is not a number
  for (int64_t v = threadIdx.x * N; v < vocabulary; v += kEntropyThreads * N) {
    float values[N];
    load_logits(logits + v, bias_at(v), values);
    float larger = largest;
#pragma unroll
    for (int i = 0; i < N; ++i) larger = fmaxf(larger, values[i]);
    total *= expf(largest - larger);
#pragma unroll
    for (int i = 0; i < N; ++i) total += expf(values[i] - larger);
    largest = larger;
  }
  const float row_largest = block_reduce(largest, Maximum{});
  const float denominator = block_reduce(total * expf(largest - row_largest), Sum{});
  const float inverse = 1.0f / denominator;
  if (threadIdx.x == 0) args.losses[row] = row_largest + logf(denominator) - target_logit[0];

  for (int64_t v = threadIdx.x * N; v < vocabulary; v += kEntropyThreads * N) {
    float values[N];
    load_logits(logits + v, bias_at(v), values);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = expf(values[i] - row_largest) * inverse - (v + i == target ? 1.0f : 0.0f);
    store<N>(logits + v, values);
  }
}

// ---- Pixel loss ----

// Pixels of one patch in (row, column, channel) order.
struct Patch {
  const float* corner;
  int64_t plane, width;
  int row_values;  // values per row of the patch: 3 P

  __device__ __forceinline__ Patch(const PixelLoss& args, int64_t item)
      : plane(args.height * args.width), width(args.width), row_values(3 * static_cast<int>(args.patch_size)) {
    const int64_t id = args.masked_patch_ids[item], columns = width / args.patch_size;
    const float* image = args.pixel_values + item / args.masked * 3 * plane;
    corner = image + id / columns * args.patch_size * width + id % columns * args.patch_size;
  }

  __device__ __forceinline__ float operator[](int value) const {
    const int row = value / row_values, in_row = value - row * row_values;
    const int column = in_row / 3, channel = in_row - column * 3;
    return corner[channel * plane + row * width + column];
  }
};

__device__ __forceinline__ int patch_values(const PixelLoss& args) {
  return static_cast<int>(args.patch_size * args.patch_size) * 3;
}

// The target of a pixel is (pixel - mean) * scale; the defaults give exactly the pixel, bit for bit.
struct Normalization {
  float mean = 0.0f, scale = 1.0f;
};

// Normalization of a patch to mean 0 and unbiased variance 1; the whole warp calls it.
__device__ __forceinline__ Normalization normalization_of(const Patch& patch, int values, float eps) {
  float sum = 0.0f, squares = 0.0f;
  for (int v = lane_id(); v < values; v += kWarp) sum += patch[v];
  const float mean = warp_sum(sum) / static_cast<float>(values);
  for (int v = lane_id(); v < values; v += kWarp) squares += (patch[v] - mean) * (patch[v] - mean);
  const float variance = warp_sum(squares) / static_cast<float>(values - 1);
  return {mean, 1.0f / sqrtf(variance + eps)};
}

// One warp per masked patch; the patch stays in the cache for three passes: mean, variance, error. Raw pixels need only
// the last pass.
template <typename T>
__global__ void __launch_bounds__(kPatchWarps * kWarp, 4) pixel_loss_kernel(const PixelLoss args) {
  const int64_t item = global_warp_id();
  if (item >= args.batch * args.masked) return;
  const Patch patch(args, item);
  const int values = patch_values(args);
  const T* predictions = static_cast<const T*>(args.predictions) + item * values;
  const Normalization target = args.normalize ? normalization_of(patch, values, args.eps) : Normalization{};
  float errors = 0.0f;
  for (int v = lane_id(); v < values; v += kWarp) {
    const float error = to_float(predictions[v]) - (patch[v] - target.mean) * target.scale;
    errors += error * error;
  }
  const float loss = warp_sum(errors) / static_cast<float>(values);
  if (lane_id() != 0) return;
  args.losses[item] = loss;
  args.mean[item] = target.mean;
  args.scale[item] = target.scale;
}

template <typename T>
__global__ void __launch_bounds__(kPatchWarps * kWarp, 4) pixel_loss_backward_kernel(const PixelLossBackward args) {
  const PixelLoss& forward = args.forward;
  const int64_t item = global_warp_id();
  if (item >= forward.batch * forward.masked) return;
  const Patch patch(forward, item);
  const int values = patch_values(forward);
  const T* predictions = static_cast<const T*>(forward.predictions) + item * values;
  T* d_predictions = static_cast<T*>(args.d_predictions) + item * values;
  const float factor = args.d_losses[item] * 2.0f / static_cast<float>(values);
  const float mean = forward.mean[item], scale = forward.scale[item];
  for (int v = lane_id(); v < values; v += kWarp)
    round_to(d_predictions[v], (to_float(predictions[v]) - (patch[v] - mean) * scale) * factor);
}

}  // namespace eve_ds
