// CPU implementations of the ops of namespace eve_ds on torch's stable ABI: checks, allocates, picks the build for this
// processor, runs ranges on torch's threads. The schemas are in ../eve_ds/ops/schema.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "cpu_kernels.h"

namespace eve_ds {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

struct Kernels {
  const RoutingKernels* routing;
  const LossKernels* losses;
};

// The best build that this processor runs, or the one that EVE_DS_ISA (base, v3, v4) names.
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
  if (level == 4) return {&v4::routing_kernels, &v4::loss_kernels};
  if (level == 3) return {&v3::routing_kernels, &v3::loss_kernels};
#endif
  return {&base::routing_kernels, &base::loss_kernels};
}

const Kernels& kernels() {
  static const Kernels picked = pick_kernels();
  return picked;
}

Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

Optional dense(const Optional& tensor) {
  return tensor.has_value() ? Optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* pointer(const Optional& tensor) {
  return tensor.has_value() ? pointer<T>(*tensor) : nullptr;
}

template <typename T>
T* writable(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

void check(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) same = same && tensor.size(axis++) == size;
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

void check(const Optional& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  if (tensor.has_value()) check(*tensor, name, dtype, sizes);
}

// Ids index memory: one out of range must not be followed.
void check_ids(const Tensor& ids, const char* name, int64_t lowest, int64_t end) {
  const int64_t* id = pointer<int64_t>(ids);
  bool inside = true;
  for (int64_t i = 0; i < ids.numel(); ++i) inside = inside && id[i] >= lowest && id[i] < end;
  STD_TORCH_CHECK(inside, name, " must be at least ", lowest, " and below ", end);
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be float32 or bfloat16 on CPU");
  return type == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBFloat16;
}

template <typename F>
void parallel(int64_t count, int64_t grain, const F& run) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, run);
}

// Turns counts per (choice, chunk, expert) into the first row of each; returns nothing, fills counts and statistics.
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

// Adds up chunk sums (C, n) in order into (n,).
void add_chunks(const float* sums, int64_t chunks, int64_t count, float* total) {
  std::fill(total, total + count, 0.0f);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < count; ++i) total[i] += sums[c * count + i];
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed route_topk(
    const Tensor& logits_in, const Optional& modality_bias_in, const Optional& modality_ids_in, const Optional& valid_in,
    const Optional& noise_in, int64_t top_k, int64_t capacity) {
  STD_TORCH_CHECK(logits_in.dim() == 2, "logits must be (T, E)");
  const int64_t tokens = logits_in.size(0), experts = logits_in.size(1);
  STD_TORCH_CHECK(experts >= 1 && experts <= kMaxExperts, "experts (", experts, ") must be 1 to ", kMaxExperts);
  STD_TORCH_CHECK(
      top_k >= 1 && top_k <= experts && top_k <= kMaxTopK, "top_k (", top_k, ") must be 1 to ", std::min(experts, kMaxTopK));
  const int64_t rows = capacity < 0 ? tokens * top_k : experts * capacity;
  STD_TORCH_CHECK(std::max(rows, tokens * top_k) < INT32_MAX, "too many routes for one call: ", tokens * top_k);
  const Tensor logits = dense(logits_in);
  const Optional bias = dense(modality_bias_in), modality_ids = dense(modality_ids_in);
  const Optional valid = dense(valid_in), noise = dense(noise_in);
  check(logits, "logits", ScalarType::Float, {tokens, experts});
  check(valid, "valid", ScalarType::Bool, {tokens});
  check(noise, "noise", ScalarType::Float, {tokens, experts});
  STD_TORCH_CHECK(bias.has_value() == modality_ids.has_value(), "modality_bias and modality_ids need each other");
  if (bias.has_value()) {
    check(bias, "modality_bias", ScalarType::Float, {bias->size(0), experts});
    check(modality_ids, "modality_ids", ScalarType::Long, {tokens});
    check_ids(*modality_ids, "modality_ids", 0, bias->size(0));
  }
  const int64_t chunks = num_chunks(tokens);
  const Tensor expert_ids = make(logits, {tokens, top_k}, ScalarType::Long);
  const Tensor slots = make(logits, {tokens, top_k}, ScalarType::Long);
  const Tensor gates = make(logits, {tokens, top_k}, ScalarType::Float);
  const Tensor source = make(logits, {rows}, ScalarType::Long);
  const Tensor counts = make(logits, {experts}, ScalarType::Long);
  const Tensor probabilities = make(logits, {tokens, experts}, ScalarType::Float);
  const Tensor first_choices = make(logits, {experts}, ScalarType::Float);
  const Tensor probability_sum = make(logits, {experts}, ScalarType::Float);
  const Tensor log_sum_exp = make(logits, {tokens}, ScalarType::Float);
  const Tensor z_sum = make(logits, {}, ScalarType::Float);
  const Tensor chunk_sums = make(logits, {chunks, experts + 1}, ScalarType::Float);
  const Tensor chunk_counts = make(logits, {top_k, chunks, experts}, ScalarType::Int);
  const Route route{
      pointer<float>(logits), pointer<float>(bias), pointer<int64_t>(modality_ids), pointer<bool>(valid),
      pointer<float>(noise), tokens, experts, top_k, capacity, rows, writable<int64_t>(expert_ids),
      writable<int64_t>(slots), writable<float>(gates), writable<int64_t>(source), writable<int64_t>(counts),
      writable<float>(probabilities), writable<float>(log_sum_exp), writable<float>(first_choices),
      writable<float>(probability_sum), writable<float>(z_sum), writable<float>(chunk_sums),
      writable<int32_t>(chunk_counts)};
  std::fill(route.source, route.source + rows, int64_t{-1});
  parallel(chunks, 4, [&](int64_t first, int64_t end) { kernels().routing->choose(route, first, end); });
  number_rows(route);
  parallel(chunks, 4, [&](int64_t first, int64_t end) { kernels().routing->place(route, first, end); });
  return {gates, expert_ids, slots, source, counts, probabilities, first_choices, probability_sum, log_sum_exp, z_sum};
}

std::tuple<Tensor, Tensor> route_topk_backward(
    const Optional& d_gates_in, const Optional& d_probability_sum_in, const Optional& d_z_sum_in,
    const Tensor& probabilities, const Tensor& log_sum_exp, const Tensor& expert_ids, const Tensor& slots,
    const Tensor& gates, const Optional& valid_in, const Optional& modality_ids_in, int64_t modalities) {
  const int64_t tokens = probabilities.size(0), experts = probabilities.size(1), top_k = gates.size(1);
  const Optional d_gates = dense(d_gates_in), d_probability_sum = dense(d_probability_sum_in);
  const Optional d_z_sum = dense(d_z_sum_in), valid = dense(valid_in);
  const Optional modality_ids = dense(modality_ids_in);
  check(d_gates, "d_gates", ScalarType::Float, {tokens, top_k});
  check(d_probability_sum, "d_probability_sum", ScalarType::Float, {experts});
  check(d_z_sum, "d_z_sum", ScalarType::Float, {});
  check(valid, "valid", ScalarType::Bool, {tokens});
  check(modality_ids, "modality_ids", ScalarType::Long, {tokens});
  const int64_t chunks = num_chunks(tokens);
  const Tensor d_logits = make(probabilities, {tokens, experts}, ScalarType::Float);
  const Tensor d_bias = make(probabilities, {modalities, experts}, ScalarType::Float);
  const Tensor chunk_d_bias = make(probabilities, {chunks, modalities, experts}, ScalarType::Float);
  const RouteBackward route{
      pointer<float>(probabilities), pointer<float>(log_sum_exp), pointer<int64_t>(expert_ids), pointer<int64_t>(slots),
      pointer<float>(gates), pointer<bool>(valid), pointer<int64_t>(modality_ids), pointer<float>(d_gates),
      pointer<float>(d_probability_sum), pointer<float>(d_z_sum), tokens, experts, top_k, modalities,
      writable<float>(d_logits), modalities ? writable<float>(d_bias) : nullptr,
      modalities ? writable<float>(chunk_d_bias) : nullptr};
  parallel(chunks, 4, [&](int64_t first, int64_t end) { kernels().routing->route_backward(route, first, end); });
  if (modalities) add_chunks(route.chunk_d_bias, chunks, modalities * experts, route.d_bias);
  return {d_logits, d_bias};
}

Tensor moe_dispatch(
    const Tensor& x_in, const Tensor& slots, const Tensor& source_in, const Optional& embedding_in,
    const Optional& modality_ids_in) {
  const Tensor x = dense(x_in), source = dense(source_in);
  const Optional embedding = dense(embedding_in), modality_ids = dense(modality_ids_in);
  STD_TORCH_CHECK(x.dim() == 2, "x must be (T, D)");
  const int64_t tokens = x.size(0), width = x.size(1), rows = source.numel();
  check(source, "source", ScalarType::Long, {rows});
  check_ids(source, "source", -1, tokens);
  if (embedding.has_value()) {
    STD_TORCH_CHECK(modality_ids.has_value(), "modality_embedding needs modality_ids");
    check(embedding, "modality_embedding", ScalarType::Float, {embedding->size(0), width});
    check(modality_ids, "modality_ids", ScalarType::Long, {tokens});
    check_ids(*modality_ids, "modality_ids", 0, embedding->size(0));
  }
  const Tensor out = make(x, {rows, width}, x.scalar_type());
  const Dispatch args{x.const_data_ptr(), pointer<int64_t>(source), pointer<float>(embedding),
                      pointer<int64_t>(modality_ids), rows, width, out.mutable_data_ptr()};
  const Dtype dtype = dtype_of(x, "x");
  parallel(rows, 64, [&](int64_t first, int64_t end) { kernels().routing->dispatch(args, dtype, first, end); });
  return out;
}

std::tuple<Tensor, Tensor> moe_dispatch_backward(
    const Tensor& d_rows_in, const Tensor& slots_in, const Optional& modality_ids_in, int64_t modalities) {
  const Tensor d_rows = dense(d_rows_in), slots = dense(slots_in);
  const Optional modality_ids = dense(modality_ids_in);
  const int64_t tokens = slots.size(0), top_k = slots.size(1), width = d_rows.size(1), chunks = num_chunks(tokens);
  STD_TORCH_CHECK(top_k <= kMaxTopK, "top_k (", top_k, ") must be at most ", kMaxTopK);
  check(slots, "slots", ScalarType::Long, {tokens, top_k});
  check_ids(slots, "slots", -1, d_rows.size(0));
  STD_TORCH_CHECK(modalities == 0 || modality_ids.has_value(), "the gradient of modality_embedding needs modality_ids");
  if (modalities) {
    check(modality_ids, "modality_ids", ScalarType::Long, {tokens});
    check_ids(*modality_ids, "modality_ids", 0, modalities);
  }
  const Tensor d_x = make(d_rows, {tokens, width}, d_rows.scalar_type());
  const Tensor d_embedding = make(d_rows, {modalities, width}, ScalarType::Float);
  const Tensor chunk_sums = make(d_rows, {chunks, modalities, width}, ScalarType::Float);
  const DispatchBackward args{d_rows.const_data_ptr(), pointer<int64_t>(slots), pointer<int64_t>(modality_ids), tokens,
                              top_k, width, modalities, d_x.mutable_data_ptr(),
                              modalities ? writable<float>(d_embedding) : nullptr,
                              modalities ? writable<float>(chunk_sums) : nullptr};
  const Dtype dtype = dtype_of(d_rows, "d_rows");
  parallel(chunks, 1, [&](int64_t first, int64_t end) { kernels().routing->dispatch_backward(args, dtype, first, end); });
  if (modalities) add_chunks(args.chunk_d_embedding, chunks, modalities * width, args.d_embedding);
  return {d_x, d_embedding};
}

Tensor moe_combine(const Tensor& rows_in, const Tensor& slots_in, const Tensor& gates_in, const Tensor& source) {
  const Tensor rows = dense(rows_in), slots = dense(slots_in), gates = dense(gates_in);
  STD_TORCH_CHECK(rows.dim() == 2 && slots.dim() == 2, "expert_rows must be (R, D) and slots (T, K)");
  const int64_t tokens = slots.size(0), top_k = slots.size(1), width = rows.size(1);
  STD_TORCH_CHECK(top_k <= kMaxTopK, "top_k (", top_k, ") must be at most ", kMaxTopK);
  check(slots, "slots", ScalarType::Long, {tokens, top_k});
  check_ids(slots, "slots", -1, rows.size(0));
  check(gates, "gates", ScalarType::Float, {tokens, top_k});
  const Tensor out = make(rows, {tokens, width}, rows.scalar_type());
  const Combine args{rows.const_data_ptr(), pointer<int64_t>(slots), pointer<float>(gates), tokens, top_k, width,
                     out.mutable_data_ptr()};
  const Dtype dtype = dtype_of(rows, "expert_rows");
  parallel(num_chunks(tokens), 1,
           [&](int64_t first, int64_t end) { kernels().routing->combine(args, dtype, first, end); });
  return out;
}

std::tuple<Tensor, Tensor> moe_combine_backward(
    const Tensor& d_out_in, const Tensor& rows_in, const Tensor& slots_in, const Tensor& gates_in,
    const Tensor& source_in) {
  const Tensor d_out = dense(d_out_in), rows = dense(rows_in), slots = dense(slots_in);
  const Tensor gates = dense(gates_in), source = dense(source_in);
  const int64_t tokens = slots.size(0), top_k = slots.size(1), width = rows.size(1), num_rows = rows.size(0);
  check(d_out, "d_out", rows.scalar_type(), {tokens, width});
  check(source, "source", ScalarType::Long, {num_rows});
  check(gates, "gates", ScalarType::Float, {tokens, top_k});
  check_ids(slots, "slots", -1, num_rows);
  const Tensor d_rows = make(rows, {num_rows, width}, rows.scalar_type());
  const Tensor d_gates = make(rows, {tokens, top_k}, ScalarType::Float);
  const CombineBackward args{d_out.const_data_ptr(), rows.const_data_ptr(), pointer<int64_t>(slots),
                             pointer<int64_t>(source), pointer<float>(gates), tokens, top_k, width, num_rows,
                             d_rows.mutable_data_ptr(), writable<float>(d_gates)};
  const Dtype dtype = dtype_of(rows, "expert_rows");
  parallel(num_chunks(tokens), 1,
           [&](int64_t first, int64_t end) { kernels().routing->combine_backward(args, dtype, first, end); });
  parallel(num_rows, 512,
           [&](int64_t first, int64_t end) { kernels().routing->zero_empty_rows(args, dtype, first, end); });
  return {d_rows, d_gates};
}

Tensor cross_entropy_inplace_(const Tensor& logits, const Optional& bias_in, const Tensor& target_in) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be (N, V) and contiguous");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  const Optional bias = dense(bias_in);
  const Tensor target = dense(target_in);
  check(bias, "bias", ScalarType::Float, {vocabulary});
  check(target, "target", ScalarType::Long, {rows});
  check_ids(target, "target", 0, vocabulary);
  const Tensor losses = make(logits, {rows}, ScalarType::Float);
  const CrossEntropy args{logits.mutable_data_ptr(), pointer<float>(bias), pointer<int64_t>(target), rows, vocabulary,
                          writable<float>(losses)};
  const Dtype dtype = dtype_of(logits, "logits");
  parallel(rows, 1, [&](int64_t first, int64_t end) { kernels().losses->cross_entropy(args, dtype, first, end); });
  return losses;
}

PixelLoss pixel_loss_arguments(
    const Tensor& pixel_values, const Tensor& predictions, const Tensor& masked_patch_ids, int64_t patch_size, double eps) {
  STD_TORCH_CHECK(pixel_values.dim() == 4 && masked_patch_ids.dim() == 2, "pixel_values must be (B, 3, H, W)");
  STD_TORCH_CHECK(patch_size >= 1 && patch_size <= kMaxPatchSize, "patch_size must be 1 to ", kMaxPatchSize);
  const int64_t batch = pixel_values.size(0), height = pixel_values.size(2), width = pixel_values.size(3);
  const int64_t masked = masked_patch_ids.size(1);
  check(pixel_values, "pixel_values", ScalarType::Float, {batch, 3, height, width});
  check(masked_patch_ids, "masked_patch_ids", ScalarType::Long, {batch, masked});
  check(predictions, "predictions", predictions.scalar_type(), {batch, masked, patch_size * patch_size * 3});
  check_ids(masked_patch_ids, "masked_patch_ids", 0, (height / patch_size) * (width / patch_size));
  return {pointer<float>(pixel_values), predictions.const_data_ptr(), pointer<int64_t>(masked_patch_ids), batch, masked,
          height, width, patch_size, static_cast<float>(eps), nullptr, nullptr, nullptr};
}

std::tuple<Tensor, Tensor, Tensor> masked_pixel_loss(
    const Tensor& pixels_in, const Tensor& predictions_in, const Tensor& ids_in, int64_t patch_size, double eps) {
  const Tensor pixels = dense(pixels_in), predictions = dense(predictions_in), ids = dense(ids_in);
  PixelLoss args = pixel_loss_arguments(pixels, predictions, ids, patch_size, eps);
  const Tensor losses = make(pixels, {args.batch, args.masked}, ScalarType::Float);
  const Tensor mean = make(pixels, {args.batch, args.masked}, ScalarType::Float);
  const Tensor scale = make(pixels, {args.batch, args.masked}, ScalarType::Float);
  args.losses = writable<float>(losses);
  args.mean = writable<float>(mean);
  args.scale = writable<float>(scale);
  const Dtype dtype = dtype_of(predictions, "predictions");
  parallel(args.batch * args.masked, 32,
           [&](int64_t first, int64_t end) { kernels().losses->pixel_loss(args, dtype, first, end); });
  return {losses, mean, scale};
}

Tensor masked_pixel_loss_backward(
    const Tensor& d_losses_in, const Tensor& pixels_in, const Tensor& predictions_in, const Tensor& ids_in,
    const Tensor& mean, const Tensor& scale, int64_t patch_size) {
  const Tensor pixels = dense(pixels_in), predictions = dense(predictions_in), ids = dense(ids_in);
  const Tensor d_losses = dense(d_losses_in);
  PixelLoss forward = pixel_loss_arguments(pixels, predictions, ids, patch_size, 0.0);
  check(d_losses, "d_losses", ScalarType::Float, {forward.batch, forward.masked});
  forward.mean = writable<float>(mean);
  forward.scale = writable<float>(scale);
  const Tensor d_predictions = make(
      predictions, {forward.batch, forward.masked, patch_size * patch_size * 3}, predictions.scalar_type());
  const PixelLossBackward args{forward, pointer<float>(d_losses), d_predictions.mutable_data_ptr()};
  const Dtype dtype = dtype_of(predictions, "predictions");
  parallel(forward.batch * forward.masked, 32,
           [&](int64_t first, int64_t end) { kernels().losses->pixel_loss_backward(args, dtype, first, end); });
  return d_predictions;
}

}  // namespace
}  // namespace eve_ds

STABLE_TORCH_LIBRARY_IMPL(eve_ds, CPU, m) {
  m.impl("route_topk", TORCH_BOX(&eve_ds::route_topk));
  m.impl("route_topk_backward", TORCH_BOX(&eve_ds::route_topk_backward));
  m.impl("moe_dispatch", TORCH_BOX(&eve_ds::moe_dispatch));
  m.impl("moe_dispatch_backward", TORCH_BOX(&eve_ds::moe_dispatch_backward));
  m.impl("moe_combine", TORCH_BOX(&eve_ds::moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&eve_ds::moe_combine_backward));
  m.impl("cross_entropy_inplace_", TORCH_BOX(&eve_ds::cross_entropy_inplace_));
  m.impl("masked_pixel_loss", TORCH_BOX(&eve_ds::masked_pixel_loss));
  m.impl("masked_pixel_loss_backward", TORCH_BOX(&eve_ds::masked_pixel_loss_backward));
}
