// quick_gelu(x) = x * sigmoid(1.702 x) on the CPU, one pass each way. Compiled once per instruction set into namespace
// EVE_ISA.

#include <cmath>

#include "cpu_kernels.h"
#include "vector.h"

namespace eve_ds {
namespace EVE_ISA {

namespace {

constexpr float kSlope = 1.702f;

// 1 / (1 + e^-z) by way of e^-|z|, which cannot overflow.
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

}  // namespace

const ActivationKernels activation_kernels = {quick_gelu};

}  // namespace EVE_ISA
}  // namespace eve_ds
