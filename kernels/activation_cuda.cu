// quick_gelu(x) = x * sigmoid(1.702 x) on a GPU, one pass each way.

#include <cmath>

#include "cuda_launch.h"

namespace eve_ds {

constexpr int kActivationThreads = 256;

template <typename T, int N>
__global__ void quick_gelu_kernel(QuickGelu args) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (first >= args.count) return;
  constexpr float slope = 1.702f;
  float x[N], d_out[N], out[N];
  load(static_cast<const T*>(args.x) + first, x);
  if (args.d_out != nullptr) load(static_cast<const T*>(args.d_out) + first, d_out);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // Where the exponential is infinite the quotient is 0, as it should be.
    const float sigmoid = __fdividef(1.0f, 1.0f + expf(-slope * x[i]));
    out[i] = args.d_out == nullptr ? x[i] * sigmoid
                                   : d_out[i] * (sigmoid + slope * x[i] * sigmoid * (1.0f - sigmoid));
  }
  store(static_cast<T*>(args.out) + first, out);
}

const char* launch_quick_gelu(const QuickGelu& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.count * size_of(dtype), args.x, args.d_out, args.out);
  return with_row_type(dtype, aligned, [&](auto row) {
    constexpr int values = decltype(row)::kValues;
    const auto kernel = quick_gelu_kernel<typename decltype(row)::Value, values>;
    return launch(kernel, blocks_for(args.count, kActivationThreads * values), kActivationThreads, stream, args);
  });
}

}  // namespace eve_ds
