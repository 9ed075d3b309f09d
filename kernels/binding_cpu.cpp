// The ops of namespace eve_ds on the CPU: binding.h over the build for this processor, run on torch's threads.

#include <algorithm>
#include <cstdlib>
#include <string>

#include "binding.h"
#include "cpu_kernels.h"

namespace eve_ds {
namespace {

struct Kernels {
  const RoutingKernels* routing;
  const LossKernels* losses;
  const ActivationKernels* activations;
};

// Best build that this processor can run, or the build that EVE_DS_ISA (base, v3, v4) selects.
Kernels pick_kernels() {
  int level = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) level = 3;
  if (__builtin_cpu_supports("x86-64-v4")) level = 4;
  if (const char* wanted = std::getenv("EVE_DS_ISA")) {
    const std::string name = wanted;
    const int asked = name == "base" ? 0 : name == "v3" ? 3 : name == "v4" ? 4 : -1;
    STD_TORCH_CHECK(asked >= 0 && asked <= level, "EVE_DS_ISA (", name, ") must be base, v3 or v4, and run here");
    level = asked;
  }
  if (level == 4) return {&v4::routing_kernels, &v4::loss_kernels, &v4::activation_kernels};
  if (level == 3) return {&v3::routing_kernels, &v3::loss_kernels, &v3::activation_kernels};
#endif
  return {&base::routing_kernels, &base::loss_kernels, &base::activation_kernels};
}

const Kernels& kernels() {
  static const Kernels picked = pick_kernels();
  return picked;
}

template <typename F>
void parallel(int64_t count, int64_t grain, const F& run) {
  kernels();  // outside torch's threads, which would lose the message of a refusal
  if (count > 0) torch::stable::parallel_for(0, count, grain, run);
}

// Converts counts per (choice, chunk, expert) into the first row of each; fills counts and statistics of the route.
void number_rows(const Route& route) {
  const int64_t chunks = num_chunks(route.tokens), experts = route.experts;
  int64_t start = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t first_choices = 0, routes = 0;
    const int64_t first_row = route.capacity < 0 ? start : e * route.capacity;
    for (int64_t k = 0; k < route.top_k; ++k) {
      for (int64_t c = 0; c < chunks; ++c) {
        int32_t& cell = route.chunk_counts[(k * chunks + c) * experts + e];
        const int32_t here = cell;
        cell = static_cast<int32_t>(first_row + routes);
        routes += here;
        if (k == 0) first_choices += here;
      }
    }
    start += routes;
    route.counts[e] = route.capacity < 0 ? routes : std::min(routes, route.capacity);
    route.first_choices[e] = static_cast<float>(first_choices);
    float probability = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) probability += route.chunk_sums[c * (experts + 1) + e];
    route.probability_sum[e] = probability;
  }
  float z_sum = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) z_sum += route.chunk_sums[c * (experts + 1) + experts];
  *route.z_sum = z_sum;
}

// Adds chunk sums (C, n) in order into (n,).
void add_chunks(const float* sums, int64_t chunks, int64_t count, float* total) {
  std::fill(total, total + count, 0.0f);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < count; ++i) total[i] += sums[c * count + i];
}

class CpuDevice {
 public:
  explicit CpuDevice(const Tensor&) {}

  Dtype dtype_of(const Tensor& tensor, const char* name) const {
    const ScalarType type = tensor.scalar_type();
    if (type == ScalarType::BFloat16) return Dtype::kBFloat16;
    STD_TORCH_CHECK(type == ScalarType::Float, name, " must be float32 or bfloat16 on CPU");
    return Dtype::kFloat32;
  }

  void check_ids(const Tensor& ids, const char* name, int64_t lowest, int64_t end) const {
    const int64_t* id = pointer<int64_t>(ids);
    bool inside = true;
    for (int64_t i = 0; i < ids.numel(); ++i) inside = inside && id[i] >= lowest && id[i] < end;
    STD_TORCH_CHECK(inside, name, " must be at least ", lowest, " and below ", end);
  }

  void check_ends(const Tensor& ends, int64_t rows) const {
    const int32_t* end = pointer<int32_t>(ends);
    const bool ascend = std::is_sorted(end, end + ends.numel());
    STD_TORCH_CHECK(ascend && end[0] >= 0 && end[ends.numel() - 1] <= rows, "ends must ascend from 0 to ", rows);
  }

  int64_t embedding_chunks(int64_t tokens) const { return num_chunks(tokens); }

  void run(const Route& args) const {
    const int64_t chunks = num_chunks(args.tokens);
    std::fill(args.source, args.source + args.rows, int64_t{-1});
    parallel(chunks, 4, [&](int64_t first, int64_t end) { kernels().routing->choose(args, first, end); });
    number_rows(args);
    parallel(chunks, 4, [&](int64_t first, int64_t end) { kernels().routing->place(args, first, end); });
  }

  void run(const RouteBackward& args) const {
    const int64_t chunks = num_chunks(args.tokens);
    parallel(chunks, 4, [&](int64_t first, int64_t end) { kernels().routing->route_backward(args, first, end); });
    if (args.modalities) add_chunks(args.chunk_d_bias, chunks, args.modalities * args.experts, args.d_bias);
  }

  void run(const Dispatch& args, Dtype dtype) const {
    parallel(args.rows, 64, [&](int64_t first, int64_t end) { kernels().routing->dispatch(args, dtype, first, end); });
  }

  void run(const DispatchBackward& args, Dtype dtype) const {
    const int64_t chunks = num_chunks(args.tokens);
    parallel(chunks, 1,
             [&](int64_t first, int64_t end) { kernels().routing->dispatch_backward(args, dtype, first, end); });
    if (args.modalities) add_chunks(args.chunk_d_embedding, chunks, args.modalities * args.width, args.d_embedding);
  }

  void run(const Combine& args, Dtype dtype) const {
    parallel(num_chunks(args.tokens), 1,
             [&](int64_t first, int64_t end) { kernels().routing->combine(args, dtype, first, end); });
  }

  void run(const CombineBackward& args, Dtype dtype) const {
    parallel(num_chunks(args.tokens), 1,
             [&](int64_t first, int64_t end) { kernels().routing->combine_backward(args, dtype, first, end); });
    parallel(args.rows, 512,
             [&](int64_t first, int64_t end) { kernels().routing->zero_empty_rows(args, dtype, first, end); });
  }

  void run(const CrossEntropy& args, Dtype dtype) const {
    parallel(args.rows, 1, [&](int64_t first, int64_t end) { kernels().losses->cross_entropy(args, dtype, first, end); });
  }

  void run(const PixelLoss& args, Dtype dtype) const {
    check_patch_size(args);
    parallel(args.batch * args.masked, 32,
             [&](int64_t first, int64_t end) { kernels().losses->pixel_loss(args, dtype, first, end); });
  }

  void run(const PixelLossBackward& args, Dtype dtype) const {
    check_patch_size(args.forward);
    parallel(args.forward.batch * args.forward.masked, 32,
             [&](int64_t first, int64_t end) { kernels().losses->pixel_loss_backward(args, dtype, first, end); });
  }

  void run(const QuickGelu& args, Dtype dtype) const {
    parallel(args.count, 1 << 14,
             [&](int64_t first, int64_t end) { kernels().activations->quick_gelu(args, dtype, first, end); });
  }

  void run(const GroupedBias& args, Dtype dtype) const {
    parallel(args.rows, 16,
             [&](int64_t first, int64_t end) { kernels().activations->grouped_bias(args, dtype, first, end); });
  }

  void run(const GroupedBiasBackward& args, Dtype dtype) const {
    parallel(num_row_chunks(args.rows), 1, [&](int64_t first, int64_t end) {
      kernels().activations->grouped_bias_backward(args, dtype, first, end);
    });
    parallel(args.experts, 1,
             [&](int64_t first, int64_t end) { kernels().activations->add_pieces(args, dtype, first, end); });
  }

 private:
  static void check_patch_size(const PixelLoss& args) {
    STD_TORCH_CHECK(args.patch_size <= kMaxPatchSize, "patch_size must be at most ", kMaxPatchSize, " on CPU");
  }
};

}  // namespace
}  // namespace eve_ds

STABLE_TORCH_LIBRARY_IMPL(eve_ds, CPU, m) { eve_ds::register_ops<eve_ds::CpuDevice>(m); }
