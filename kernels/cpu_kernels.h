// Table of functions that every build of the CPU sources provides, one table per instruction set. A function works on a
// range of chunks (arguments.h), rows or items and writes only the outputs of that range, so ranges can run on any
// thread.
#pragma once

#include "arguments.h"

namespace eve_ds {

constexpr int64_t kMaxPatchSize = 64;

struct RoutingKernels {
  // Softmax, choices and sums of each chunk: expert_ids, probabilities, log_sum_exp, chunk_sums, chunk_counts.
  void (*choose)(const Route&, int64_t first_chunk, int64_t end_chunk);
  // Rows and gates; needs the first row of each (choice, chunk, expert) in chunk_counts.
  void (*place)(const Route&, int64_t first_chunk, int64_t end_chunk);
  void (*route_backward)(const RouteBackward&, int64_t first_chunk, int64_t end_chunk);
  void (*dispatch)(const Dispatch&, Dtype, int64_t first_row, int64_t end_row);
  void (*dispatch_backward)(const DispatchBackward&, Dtype, int64_t first_chunk, int64_t end_chunk);
  void (*combine)(const Combine&, Dtype, int64_t first_chunk, int64_t end_chunk);
  void (*combine_backward)(const CombineBackward&, Dtype, int64_t first_chunk, int64_t end_chunk);
  // Sets the gradient of empty rows to zero.
  void (*zero_empty_rows)(const CombineBackward&, Dtype, int64_t first_row, int64_t end_row);
};

struct LossKernels {
  // Per row: its loss; its logits are replaced by softmax - one-hot.
  void (*cross_entropy)(const CrossEntropy&, Dtype, int64_t first, int64_t end);
  // Per masked patch of the B * N patches.
  void (*pixel_loss)(const PixelLoss&, Dtype, int64_t first, int64_t end);
  void (*pixel_loss_backward)(const PixelLossBackward&, Dtype, int64_t first, int64_t end);
};

struct ActivationKernels {
  void (*quick_gelu)(const QuickGelu&, Dtype, int64_t first, int64_t end);
  // Per row.
  void (*grouped_bias)(const GroupedBias&, Dtype, int64_t first, int64_t end);
  // Per chunk of rows: d_x, and the sum of each piece.
  void (*grouped_bias_backward)(const GroupedBiasBackward&, Dtype, int64_t first_chunk, int64_t end_chunk);
  // Per expert, after all pieces are summed: d_bias.
  void (*add_pieces)(const GroupedBiasBackward&, Dtype, int64_t first, int64_t end);
};

#define EVE_DECLARE_KERNELS(isa)                     \
  namespace isa {                                    \
  extern const RoutingKernels routing_kernels;       \
  extern const LossKernels loss_kernels;             \
  extern const ActivationKernels activation_kernels; \
  }

EVE_DECLARE_KERNELS(base)  // the compiler's default instruction set
EVE_DECLARE_KERNELS(v3)    // x86-64-v3: AVX2
EVE_DECLARE_KERNELS(v4)    // x86-64-v4: AVX-512

}  // namespace eve_ds
