// Launches of masked_loss.cuh.

#include "masked_loss.cuh"

namespace eve_ds {

const char* launch_cross_entropy(const CrossEntropy& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.vocabulary * size_of(dtype), args.logits, args.bias);
  return with_row_type(dtype, aligned, [&](auto row) {
    const auto kernel = cross_entropy_kernel<typename decltype(row)::Value, decltype(row)::kValues>;
    return launch(kernel, blocks_for(args.rows, 1), kEntropyThreads, stream, args);
  });
}

const char* launch_pixel_loss(const PixelLoss& args, Dtype dtype, void* stream) {
  return with_row_type(dtype, false, [&](auto row) {
    const auto kernel = pixel_loss_kernel<typename decltype(row)::Value>;
    return launch(kernel, blocks_for(args.batch * args.masked, kPatchWarps), kPatchWarps * kWarp, stream, args);
  });
}

const char* launch_pixel_loss_backward(const PixelLossBackward& args, Dtype dtype, void* stream) {
  const int64_t items = args.forward.batch * args.forward.masked;
  return with_row_type(dtype, false, [&](auto row) {
    const auto kernel = pixel_loss_backward_kernel<typename decltype(row)::Value>;
    return launch(kernel, blocks_for(items, kPatchWarps), kPatchWarps * kWarp, stream, args);
  });
}

}  // namespace eve_ds
