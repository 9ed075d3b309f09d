// The ops of namespace eve_ds on a GPU: binding.h over the launch functions.

#ifndef USE_CUDA
#define USE_CUDA  // declares the function that returns torch's current stream; needs no CUDA header
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <string>

#include "binding.h"
#include "cuda_launch.h"

namespace eve_ds {
namespace {

// GPU of a tensor, current during the life of this object, and the stream that torch queues work on there.
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

  // Not checked by default, because the host would have to wait for the GPU to see the ids. An id out of range reads or
  // writes unrelated memory. With EVE_DS_CHECK=1 the GPU itself checks.
  void check_ids(const Tensor& ids, const char* name, int64_t lowest, int64_t end) const {
    if (is_checking()) check_launch(launch_check_ids(name, pointer<int64_t>(ids), ids.numel(), lowest, end, stream_));
  }

  void check_ends(const Tensor& ends, int64_t rows) const {
    if (is_checking()) check_launch(launch_check_ends(pointer<int32_t>(ends), ends.numel(), rows, stream_));
  }

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
  static bool is_checking() {
    static const char* const chosen = std::getenv("EVE_DS_CHECK");
    const std::string word = chosen == nullptr ? "" : chosen;
    STD_TORCH_CHECK(word.empty() || word == "0" || word == "1", "EVE_DS_CHECK (", word, ") must be 0 or 1");
    return word == "1";
  }

  static void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "launch of a CUDA kernel: ", error); }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace
}  // namespace eve_ds

STABLE_TORCH_LIBRARY_IMPL(eve_ds, CUDA, m) { eve_ds::register_ops<eve_ds::CudaDevice>(m); }
