// quick_gelu(x) = x * sigmoid(1.702 x) on the CPU, in one pass each for forward and backward: alone, and fused with the
// biases of all experts. Compiled once per instruction set into namespace EVE_ISA.

#include <cmath>

#include "cpu_kernels.h"
#include "vector.h"

namespace eve_ds {
namespace EVE_ISA {

namespace {

constexpr float kSlope = 1.702f;

// 1 / (1 + e^-z), computed from e^-|z|, which cannot overflow.
EVE_INLINE Part sigmoid(Part z) {
  const Part small = exponential_part(z < 0.0f ? z : -z);
  const Part one = broadcast_part(1.0f);
  return (z < 0.0f ? small : one) / (one + small);
}

EVE_INLINE Floats forward(Floats x) {
  return by_parts([](Part part) EVE_LAMBDA_INLINE { return part * sigmoid(part * kSlope); }, x);
}

EVE_INLINE Floats backward(Floats x, Floats d_out) {
  return by_parts(
      [](Part part, Part d_part) EVE_LAMBDA_INLINE {
        const Part s = sigmoid(part * kSlope);
        return d_part * (s + part * kSlope * s * (1.0f - s));
      },
      x, d_out);
}

template <typename T>
void quick_gelu_range(const QuickGelu& args, int64_t first, int64_t end) {
  const T* x = static_cast<const T*>(args.x);
  const T* d_out = static_cast<const T*>(args.d_out);
  T* out = static_cast<T*>(args.out);
  int64_t i = first;
  for (; i + kLanes <= end; i += kLanes)
    store(out + i, d_out == nullptr ? forward(load(x + i)) : backward(load(x + i), load(d_out + i)));
  const int64_t rest = end - i;
  const Floats tail = load_part(x + i, rest, 0.0f);
  store_part(out + i, d_out == nullptr ? forward(tail) : backward(tail, load_part(d_out + i, rest, 0.0f)), rest);
}

void quick_gelu(const QuickGelu& args, Dtype dtype, int64_t first, int64_t end) {
  dtype == Dtype::kFloat32 ? quick_gelu_range<float>(args, first, end) : quick_gelu_range<BFloat16>(args, first, end);
}

// ---- Fused with the biases of the experts ----

// Expert that a row belongs to; the number of experts if it belongs to none.
int64_t expert_of(const int32_t* ends, int64_t experts, int64_t row) {
  int64_t expert = 0;
  while (expert < experts && ends[expert] <= row) ++expert;
  return expert;
}

// Sixteen values, or fewer at the end of a row.
template <typename T>
EVE_INLINE Floats load_some(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load_part(from, count, 0.0f);
}

template <typename T>
EVE_INLINE void store_some(T* to, Floats value, int64_t count) {
  count >= kLanes ? store(to, value) : store_part(to, value, count);
}

template <typename T>
void grouped_bias_range(const GroupedBias& args, int64_t first, int64_t end) {
  const int64_t width = args.width;
  int64_t expert = expert_of(args.ends, args.experts, first);
  for (int64_t row = first; row < end; ++row) {
    while (expert < args.experts && args.ends[expert] <= row) ++expert;
    const bool filled = expert < args.experts;
    const T* x = static_cast<const T*>(args.x) + row * width;
    const T* bias = filled && args.bias != nullptr ? static_cast<const T*>(args.bias) + expert * width : nullptr;
    T* out = static_cast<T*>(args.out) + row * width;
    for (int64_t d = 0; d < width; d += kLanes) {
      Floats value = filled ? load_some(x + d, width - d) : Floats{};
      if (bias != nullptr) value += load_some(bias + d, width - d);
      store_some(out + d, args.activate ? forward(value) : value, width - d);
    }
  }
}

// Gradients of the rows [first, end) of one expert, and their sum over the rows.
template <typename T>
void backward_of_piece(const GroupedBiasBackward& args, int64_t expert, int64_t first, int64_t end, float* sums) {
  const int64_t width = args.width;
  const T* bias = static_cast<const T*>(args.bias) + (args.bias != nullptr ? expert * width : 0);
  for (int64_t d = 0; d < width; d += kLanes) {
    const int64_t count = width - d;
    const Floats shift = args.bias != nullptr ? load_some(bias + d, count) : Floats{};
    Floats total = {};
    for (int64_t row = first; row < end; ++row) {
      const int64_t at = row * width + d;
      Floats gradient = load_some(static_cast<const T*>(args.d_out) + at, count);
      if (args.x != nullptr) {
        gradient = backward(load_some(static_cast<const T*>(args.x) + at, count) + shift, gradient);
        store_some(static_cast<T*>(args.d_x) + at, gradient, count);
      }
      total += gradient;
    }
    store_some(sums + d, total, count);
  }
}

template <typename T>
void grouped_bias_backward_chunks(const GroupedBiasBackward& args, int64_t first_chunk, int64_t end_chunk) {
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    int64_t first = chunk * kChunkRows;
    const int64_t end = first + kChunkRows < args.rows ? first + kChunkRows : args.rows;
    for (int64_t e = expert_of(args.ends, args.experts, first); e < args.experts && first < end; ++e) {
      const int64_t piece_end = args.ends[e] < end ? args.ends[e] : end;
      if (piece_end <= first) continue;  // an expert without rows
      backward_of_piece<T>(args, e, first, piece_end, args.piece_sums + (chunk + e) * args.width);
      first = piece_end;
    }
    if (args.d_x != nullptr)
      std::memset(static_cast<T*>(args.d_x) + first * args.width, 0, (end - first) * args.width * sizeof(T));
  }
}

template <typename T>
void add_pieces_of(const GroupedBiasBackward& args, int64_t first, int64_t end) {
  const int64_t width = args.width;
  for (int64_t e = first; e < end; ++e) {
    const int64_t start = e > 0 ? args.ends[e - 1] : 0;
    const int64_t first_chunk = start / kChunkRows;
    const int64_t end_chunk = args.ends[e] > start ? (args.ends[e] - 1) / kChunkRows + 1 : first_chunk;
    for (int64_t d = 0; d < width; d += kLanes) {
      Floats total = {};
      for (int64_t c = first_chunk; c < end_chunk; ++c)
        total += load_some(args.piece_sums + (c + e) * width + d, width - d);
      store_some(static_cast<T*>(args.d_bias) + e * width + d, total, width - d);
    }
  }
}

void grouped_bias(const GroupedBias& args, Dtype dtype, int64_t first, int64_t end) {
  dtype == Dtype::kFloat32 ? grouped_bias_range<float>(args, first, end) : grouped_bias_range<BFloat16>(args, first, end);
}

void grouped_bias_backward(const GroupedBiasBackward& args, Dtype dtype, int64_t first, int64_t end) {
  dtype == Dtype::kFloat32 ? grouped_bias_backward_chunks<float>(args, first, end)
                           : grouped_bias_backward_chunks<BFloat16>(args, first, end);
}

void add_pieces(const GroupedBiasBackward& args, Dtype dtype, int64_t first, int64_t end) {
  dtype == Dtype::kFloat32 ? add_pieces_of<float>(args, first, end) : add_pieces_of<BFloat16>(args, first, end);
}

}  // namespace

const ActivationKernels activation_kernels = {quick_gelu, grouped_bias, grouped_bias_backward, add_pieces};

}  // namespace EVE_ISA
}  // namespace eve_ds
