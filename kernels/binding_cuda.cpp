// The ops of namespace eve_ds on a GPU: binding.h over the launch functions.

#ifndef USE_CUDA
#define USE_CUDA  // declares the function that tells torch's current stream; needs no CUDA header
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "binding.h"
#include "cuda_launch.h"

namespace eve_ds {
namespace {

// The GPU of a tensor, current as long as this lives, and the stream that torch queues on there.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& on) : guard_(on.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream_));
  }

  Dtype dtype_of(const Tensor& tensor, const char* name) const {
    const ScalarType type = tensor.scalar_type();
    if (type == ScalarType::BFloat16) return Dtype::kBFloat16;
    if (type == ScalarType::Half) return Dtype::kFloat16;
    STD_TORCH_CHECK(type == ScalarType::Float, name, " must be float32, bfloat16 or float16");
    return Dtype::kFloat32;
  }

  // Not checked: to look at ids the host would have to wait for the GPU. One out of range reads or writes other memory.
  void check_ids(const Tensor&, const char*, int64_t, int64_t) const {}

  void check_ends(const Tensor&, int64_t) const {}  // likewise

  int64_t embedding_chunks(int64_t tokens) const { return num_embedding_chunks(tokens); }

  void run(const Route& args) const { check_launch(launch_route(args, stream_)); }
  void run(const RouteBackward& args) const { check_launch(launch_route_backward(args, stream_)); }
  void run(const Dispatch& args, Dtype dtype) const { check_launch(launch_dispatch(args, dtype, stream_)); }
  void run(const DispatchBackward& args, Dtype dtype) const {
    check_launch(launch_dispatch_backward(args, dtype, stream_));
  }
  void run(const Combine& args, Dtype dtype) const { check_launch(launch_combine(args, dtype, stream_)); }
  void run(const CombineBackward& args, Dtype dtype) const {
    check_launch(launch_combine_backward(args, dtype, stream_));
  }
  void run(const CrossEntropy& args, Dtype dtype) const { check_launch(launch_cross_entropy(args, dtype, stream_)); }
  void run(const PixelLoss& args, Dtype dtype) const { check_launch(launch_pixel_loss(args, dtype, stream_)); }
  void run(const PixelLossBackward& args, Dtype dtype) const {
    check_launch(launch_pixel_loss_backward(args, dtype, stream_));
  }
  void run(const QuickGelu& args, Dtype dtype) const { check_launch(launch_quick_gelu(args, dtype, stream_)); }
  void run(const GroupedBias& args, Dtype dtype) const { check_launch(launch_grouped_bias(args, dtype, stream_)); }
  void run(const GroupedBiasBackward& args, Dtype dtype) const {
    check_launch(launch_grouped_bias_backward(args, dtype, stream_));
  }

 private:
  static void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "launch of a CUDA kernel: ", error); }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace
}  // namespace eve_ds

STABLE_TORCH_LIBRARY_IMPL(eve_ds, CUDA, m) { eve_ds::register_ops<eve_ds::CudaDevice>(m); }
