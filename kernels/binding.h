// The ops of namespace eve_ds on torch's stable ABI, independent of the device: checks, allocations, and arguments of
// the plain functions. The schemas are in ../eve_ds/ops/schema.py. A binding provides a class Device with
//   explicit Device(const Tensor& on)  constructed first; all later work runs on the device of that tensor;
//   Dtype dtype_of(tensor, name)       refuses dtypes for which the device has no kernels;
//   void check_ids(ids, name, lowest, end)  ids index memory, so an id out of range must not be used;
//   void check_ends(ends, rows)         likewise: ends must ascend and must not exceed the number of rows;
//   int64_t embedding_chunks(tokens)    number of partial sums over tokens in the gradient of an embedding;
//   void run(args) or run(args, dtype)  for every struct of arguments.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "arguments.h"

namespace eve_ds {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

inline Optional dense(const Optional& tensor) {
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

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Checks that a tensor is on the device of `like` and has this dtype and these sizes.
inline void check(
    const Tensor& tensor, const char* name, const Tensor& like, ScalarType dtype,
    std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " is on another device");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) same = same && tensor.size(axis++) == size;
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

inline void check(
    const Optional& tensor, const char* name, const Tensor& like, ScalarType dtype,
    std::initializer_list<int64_t> sizes) {
  if (tensor.has_value()) check(*tensor, name, like, dtype, sizes);
}

inline void check_top_k(int64_t top_k, int64_t largest) {
  STD_TORCH_CHECK(top_k >= 1 && top_k <= largest, "top_k (", top_k, ") must be 1 to ", largest);
}

// Modality ids are required for arguments that have one row per modality: an embedding or a bias.
template <typename Device>
void check_modalities(
    const Device& device, const Optional& modality_ids, const Tensor& like, int64_t tokens, int64_t modalities) {
  STD_TORCH_CHECK(modality_ids.has_value(), "modality_embedding and modality_bias need modality_ids");
  check(modality_ids, "modality_ids", like, ScalarType::Long, {tokens});
  device.check_ids(*modality_ids, "modality_ids", 0, modalities);
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Device>
Routed route_topk(
    const Tensor& logits_in, const Optional& modality_bias_in, const Optional& modality_ids_in,
    const Optional& valid_in, const Optional& noise_in, int64_t top_k, int64_t capacity) {
  const Device device(logits_in);
  STD_TORCH_CHECK(logits_in.dim() == 2, "logits must be (T, E)");
  const int64_t tokens = logits_in.size(0), experts = logits_in.size(1);
  STD_TORCH_CHECK(experts >= 1 && experts <= kMaxExperts, "experts (", experts, ") must be 1 to ", kMaxExperts);
  check_top_k(top_k, std::min(experts, kMaxTopK));
  const int64_t routes = tokens * top_k, rows = capacity < 0 ? routes : experts * capacity;
  STD_TORCH_CHECK(routes + rows < INT32_MAX, "too many routes (", routes, ") or rows (", rows, ") for one call");
  const Tensor logits = dense(logits_in);
  const Optional bias = dense(modality_bias_in), modality_ids = dense(modality_ids_in);
  const Optional valid = dense(valid_in), noise = dense(noise_in);
  check(logits, "logits", logits, ScalarType::Float, {tokens, experts});
  check(valid, "valid", logits, ScalarType::Bool, {tokens});
  check(noise, "noise", logits, ScalarType::Float, {tokens, experts});
  if (bias.has_value()) {
    check(bias, "modality_bias", logits, ScalarType::Float, {bias->size(0), experts});
    check_modalities(device, modality_ids, logits, tokens, bias->size(0));
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
  device.run(Route{
      pointer<float>(logits), pointer<float>(bias), pointer<int64_t>(modality_ids), pointer<bool>(valid),
      pointer<float>(noise), tokens, experts, top_k, capacity, rows, writable<int64_t>(expert_ids),
      writable<int64_t>(slots), writable<float>(gates), writable<int64_t>(source), writable<int64_t>(counts),
      writable<float>(probabilities), writable<float>(log_sum_exp), writable<float>(first_choices),
      writable<float>(probability_sum), writable<float>(z_sum), writable<float>(chunk_sums),
      writable<int32_t>(chunk_counts)});
  return {gates, expert_ids, slots, source, counts, probabilities, first_choices, probability_sum, log_sum_exp, z_sum};
}

template <typename Device>
std::tuple<Tensor, Tensor> route_topk_backward(
    const Optional& d_gates_in, const Optional& d_probability_sum_in, const Optional& d_z_sum_in,
    const Tensor& probabilities_in, const Tensor& log_sum_exp_in, const Tensor& expert_ids_in, const Tensor& slots_in,
    const Tensor& gates_in, const Optional& valid_in, const Optional& modality_ids_in, int64_t modalities) {
  const Device device(probabilities_in);
  const Optional d_gates = dense(d_gates_in), d_probability_sum = dense(d_probability_sum_in);
  const Optional d_z_sum = dense(d_z_sum_in), valid = dense(valid_in), modality_ids = dense(modality_ids_in);
  const Tensor probabilities = dense(probabilities_in), log_sum_exp = dense(log_sum_exp_in);
  const Tensor expert_ids = dense(expert_ids_in), slots = dense(slots_in), gates = dense(gates_in);
  STD_TORCH_CHECK(probabilities.dim() == 2 && gates.dim() == 2, "probabilities must be (T, E) and gates (T, K)");
  const int64_t tokens = probabilities.size(0), experts = probabilities.size(1), top_k = gates.size(1);
  check_top_k(top_k, std::min(experts, kMaxTopK));
  check(probabilities, "probabilities", probabilities, ScalarType::Float, {tokens, experts});
  check(log_sum_exp, "log_sum_exp", probabilities, ScalarType::Float, {tokens});
  check(expert_ids, "expert_ids", probabilities, ScalarType::Long, {tokens, top_k});
  check(slots, "slots", probabilities, ScalarType::Long, {tokens, top_k});
  check(gates, "gates", probabilities, ScalarType::Float, {tokens, top_k});
  check(d_gates, "d_gates", probabilities, ScalarType::Float, {tokens, top_k});
  check(d_probability_sum, "d_probability_sum", probabilities, ScalarType::Float, {experts});
  check(d_z_sum, "d_z_sum", probabilities, ScalarType::Float, {});
  check(valid, "valid", probabilities, ScalarType::Bool, {tokens});
  device.check_ids(expert_ids, "expert_ids", 0, experts);
  if (modalities) check_modalities(device, modality_ids, probabilities, tokens, modalities);
  const Tensor d_logits = make(probabilities, {tokens, experts}, ScalarType::Float);
  const Tensor d_bias = make(probabilities, {modalities, experts}, ScalarType::Float);
  const Tensor chunk_d_bias = make(probabilities, {num_chunks(tokens), modalities, experts}, ScalarType::Float);
  device.run(RouteBackward{
      pointer<float>(probabilities), pointer<float>(log_sum_exp), pointer<int64_t>(expert_ids), pointer<int64_t>(slots),
      pointer<float>(gates), pointer<bool>(valid), pointer<int64_t>(modality_ids), pointer<float>(d_gates),
      pointer<float>(d_probability_sum), pointer<float>(d_z_sum), tokens, experts, top_k, modalities,
      writable<float>(d_logits), modalities ? writable<float>(d_bias) : nullptr,
      modalities ? writable<float>(chunk_d_bias) : nullptr});
  return {d_logits, d_bias};
}

template <typename Device>
Tensor moe_dispatch(
    const Tensor& x_in, const Tensor& /*slots*/, const Tensor& source_in, const Optional& embedding_in,
    const Optional& modality_ids_in) {
  const Device device(x_in);
  const Tensor x = dense(x_in), source = dense(source_in);
  const Optional embedding = dense(embedding_in), modality_ids = dense(modality_ids_in);
  STD_TORCH_CHECK(x.dim() == 2, "x must be (T, D)");
  const int64_t tokens = x.size(0), width = x.size(1), rows = source.numel();
  check(source, "source", x, ScalarType::Long, {rows});
  device.check_ids(source, "source", -1, tokens);
  if (embedding.has_value()) {
    check(embedding, "modality_embedding", x, ScalarType::Float, {embedding->size(0), width});
    check_modalities(device, modality_ids, x, tokens, embedding->size(0));
  }
  const Dtype dtype = device.dtype_of(x, "x");
  const Tensor out = make(x, {rows, width}, x.scalar_type());
  const Dispatch args{x.const_data_ptr(), pointer<int64_t>(source), pointer<float>(embedding),
                      pointer<int64_t>(modality_ids), rows, width, out.mutable_data_ptr()};
  device.run(args, dtype);
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor> moe_dispatch_backward(
    const Tensor& d_rows_in, const Tensor& slots_in, const Optional& modality_ids_in, int64_t modalities) {
  const Device device(d_rows_in);
  const Tensor d_rows = dense(d_rows_in), slots = dense(slots_in);
  const Optional modality_ids = dense(modality_ids_in);
  STD_TORCH_CHECK(d_rows.dim() == 2 && slots.dim() == 2, "d_rows must be (R, D) and slots (T, K)");
  const int64_t tokens = slots.size(0), top_k = slots.size(1), width = d_rows.size(1);
  check_top_k(top_k, kMaxTopK);
  check(slots, "slots", d_rows, ScalarType::Long, {tokens, top_k});
  device.check_ids(slots, "slots", -1, d_rows.size(0));
  if (modalities) check_modalities(device, modality_ids, d_rows, tokens, modalities);
  const Dtype dtype = device.dtype_of(d_rows, "d_rows");
  const Tensor d_x = make(d_rows, {tokens, width}, d_rows.scalar_type());
  const Tensor d_embedding = make(d_rows, {modalities, width}, ScalarType::Float);
  const Tensor chunk_sums = make(d_rows, {device.embedding_chunks(tokens), modalities, width}, ScalarType::Float);
  const DispatchBackward args{d_rows.const_data_ptr(), pointer<int64_t>(slots), pointer<int64_t>(modality_ids), tokens,
                              top_k, width, modalities, d_x.mutable_data_ptr(),
                              modalities ? writable<float>(d_embedding) : nullptr,
                              modalities ? writable<float>(chunk_sums) : nullptr};
  device.run(args, dtype);
  return {d_x, d_embedding};
}

template <typename Device>
Tensor moe_combine(const Tensor& rows_in, const Tensor& slots_in, const Tensor& gates_in, const Tensor& /*source*/) {
  const Device device(rows_in);
  const Tensor rows = dense(rows_in), slots = dense(slots_in), gates = dense(gates_in);
  STD_TORCH_CHECK(rows.dim() == 2 && slots.dim() == 2, "expert_rows must be (R, D) and slots (T, K)");
  const int64_t tokens = slots.size(0), top_k = slots.size(1), width = rows.size(1);
  check_top_k(top_k, kMaxTopK);
  check(slots, "slots", rows, ScalarType::Long, {tokens, top_k});
  device.check_ids(slots, "slots", -1, rows.size(0));
  check(gates, "gates", rows, ScalarType::Float, {tokens, top_k});
  const Dtype dtype = device.dtype_of(rows, "expert_rows");
  const Tensor out = make(rows, {tokens, width}, rows.scalar_type());
  const Combine args{rows.const_data_ptr(), pointer<int64_t>(slots), pointer<float>(gates), tokens, top_k, width,
                     out.mutable_data_ptr()};
  device.run(args, dtype);
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor> moe_combine_backward(
    const Tensor& d_out_in, const Tensor& rows_in, const Tensor& slots_in, const Tensor& gates_in,
    const Tensor& source_in) {
  const Device device(rows_in);
  const Tensor d_out = dense(d_out_in), rows = dense(rows_in), slots = dense(slots_in);
  const Tensor gates = dense(gates_in), source = dense(source_in);
  STD_TORCH_CHECK(rows.dim() == 2 && slots.dim() == 2, "expert_rows must be (R, D) and slots (T, K)");
  const int64_t tokens = slots.size(0), top_k = slots.size(1), width = rows.size(1), num_rows = rows.size(0);
  check(d_out, "d_out", rows, rows.scalar_type(), {tokens, width});
  check(slots, "slots", rows, ScalarType::Long, {tokens, top_k});
  device.check_ids(slots, "slots", -1, num_rows);
  check(source, "source", rows, ScalarType::Long, {num_rows});
  check(gates, "gates", rows, ScalarType::Float, {tokens, top_k});
  const Dtype dtype = device.dtype_of(rows, "expert_rows");
  const Tensor d_rows = make(rows, {num_rows, width}, rows.scalar_type());
  const Tensor d_gates = make(rows, {tokens, top_k}, ScalarType::Float);
  const CombineBackward args{d_out.const_data_ptr(), rows.const_data_ptr(), pointer<int64_t>(slots),
                             pointer<int64_t>(source), pointer<float>(gates), tokens, top_k, width, num_rows,
                             d_rows.mutable_data_ptr(), writable<float>(d_gates)};
  device.run(args, dtype);
  return {d_rows, d_gates};
}

template <typename Device>
Tensor cross_entropy_inplace_(const Tensor& logits, const Optional& bias_in, const Tensor& target_in) {
  const Device device(logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be (N, V) and contiguous");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  const Optional bias = dense(bias_in);
  const Tensor target = dense(target_in);
  check(bias, "bias", logits, ScalarType::Float, {vocabulary});
  check(target, "target", logits, ScalarType::Long, {rows});
  device.check_ids(target, "target", 0, vocabulary);
  const Dtype dtype = device.dtype_of(logits, "logits");
  const Tensor losses = make(logits, {rows}, ScalarType::Float);
  const CrossEntropy args{logits.mutable_data_ptr(), pointer<float>(bias), pointer<int64_t>(target), rows, vocabulary,
                          writable<float>(losses)};
  device.run(args, dtype);
  return losses;
}

template <typename Device>
PixelLoss pixel_loss_arguments(
    const Device& device, const Tensor& pixel_values, const Tensor& predictions, const Tensor& masked_patch_ids,
    int64_t patch_size) {
  STD_TORCH_CHECK(pixel_values.dim() == 4 && masked_patch_ids.dim() == 2, "pixel_values must be (B, 3, H, W)");
  STD_TORCH_CHECK(patch_size >= 1, "patch_size (", patch_size, ") must be at least 1");
  const int64_t batch = pixel_values.size(0), height = pixel_values.size(2), width = pixel_values.size(3);
  const int64_t masked = masked_patch_ids.size(1), values = patch_size * patch_size * 3;
  STD_TORCH_CHECK(height % patch_size == 0 && width % patch_size == 0, "patch_size must divide height and width");
  check(pixel_values, "pixel_values", predictions, ScalarType::Float, {batch, 3, height, width});
  check(masked_patch_ids, "masked_patch_ids", predictions, ScalarType::Long, {batch, masked});
  check(predictions, "predictions", predictions, predictions.scalar_type(), {batch, masked, values});
  device.check_ids(masked_patch_ids, "masked_patch_ids", 0, (height / patch_size) * (width / patch_size));
  return {pointer<float>(pixel_values), predictions.const_data_ptr(), pointer<int64_t>(masked_patch_ids), batch, masked,
          height, width, patch_size, 0.0f, false, nullptr, nullptr, nullptr};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> masked_pixel_loss(
    const Tensor& pixels_in, const Tensor& predictions_in, const Tensor& ids_in, int64_t patch_size, double eps,
    bool normalize) {
  const Device device(predictions_in);
  const Tensor pixels = dense(pixels_in), predictions = dense(predictions_in), ids = dense(ids_in);
  const Dtype dtype = device.dtype_of(predictions, "predictions");
  PixelLoss args = pixel_loss_arguments(device, pixels, predictions, ids, patch_size);
  const Tensor losses = make(pixels, {args.batch, args.masked}, ScalarType::Float);
  const Tensor mean = make(pixels, {args.batch, args.masked}, ScalarType::Float);
  const Tensor scale = make(pixels, {args.batch, args.masked}, ScalarType::Float);
  args.eps = static_cast<float>(eps);
  args.normalize = normalize;
  args.losses = writable<float>(losses);
  args.mean = writable<float>(mean);
  args.scale = writable<float>(scale);
  device.run(args, dtype);
  return {losses, mean, scale};
}

template <typename Device>
Tensor masked_pixel_loss_backward(
    const Tensor& d_losses_in, const Tensor& pixels_in, const Tensor& predictions_in, const Tensor& ids_in,
    const Tensor& mean_in, const Tensor& scale_in, int64_t patch_size) {
  const Device device(predictions_in);
  const Tensor pixels = dense(pixels_in), predictions = dense(predictions_in), ids = dense(ids_in);
  const Tensor d_losses = dense(d_losses_in), mean = dense(mean_in), scale = dense(scale_in);
  const Dtype dtype = device.dtype_of(predictions, "predictions");
  PixelLoss forward = pixel_loss_arguments(device, pixels, predictions, ids, patch_size);
  check(d_losses, "d_losses", predictions, ScalarType::Float, {forward.batch, forward.masked});
  check(mean, "mean", predictions, ScalarType::Float, {forward.batch, forward.masked});
  check(scale, "scale", predictions, ScalarType::Float, {forward.batch, forward.masked});
  forward.mean = writable<float>(mean);
  forward.scale = writable<float>(scale);
  const Tensor d_predictions = make(
      predictions, {forward.batch, forward.masked, patch_size * patch_size * 3}, predictions.scalar_type());
  device.run(PixelLossBackward{forward, pointer<float>(d_losses), d_predictions.mutable_data_ptr()}, dtype);
  return d_predictions;
}

// The activation, or the gradient of its input if `d_out_in` is given.
template <typename Device>
Tensor quick_gelu_pass(const Tensor& x_in, const Optional& d_out_in) {
  const Device device(x_in);
  const Tensor x = dense(x_in);
  const Optional d_out = dense(d_out_in);
  const Dtype dtype = device.dtype_of(x, "x");
  STD_TORCH_CHECK(!d_out.has_value() || d_out->numel() == x.numel(), "d_out has the wrong shape");
  STD_TORCH_CHECK(!d_out.has_value() || d_out->scalar_type() == x.scalar_type(), "d_out has another dtype than x");
  const Tensor out = torch::stable::empty_like(x);
  device.run(QuickGelu{x.const_data_ptr(), pointer<void>(d_out), x.numel(), out.mutable_data_ptr()}, dtype);
  return out;
}

template <typename Device>
Tensor quick_gelu(const Tensor& x) {
  return quick_gelu_pass<Device>(x, std::nullopt);
}

template <typename Device>
Tensor quick_gelu_backward(const Tensor& d_out, const Tensor& x) {
  return quick_gelu_pass<Device>(x, d_out);
}

// Checks rows (R, F) and the end of each expert's rows, `ends` (E,).
template <typename Device>
void check_grouped(const Device& device, const Tensor& rows, const char* name, const Tensor& ends) {
  STD_TORCH_CHECK(rows.dim() == 2, name, " must be (R, F)");
  check(ends, "ends", rows, ScalarType::Int, {ends.numel()});
  const int64_t experts = ends.numel();
  STD_TORCH_CHECK(experts >= 1 && experts <= kMaxExperts, "experts (", experts, ") must be 1 to ", kMaxExperts);
  device.check_ends(ends, rows.size(0));
}

template <typename Device>
Tensor grouped_bias_quick_gelu(const Tensor& x_in, const Tensor& bias_in, const Tensor& ends_in) {
  const Device device(x_in);
  const Tensor x = dense(x_in), bias = dense(bias_in), ends = dense(ends_in);
  check_grouped(device, x, "x", ends);
  const int64_t rows = x.size(0), width = x.size(1), experts = ends.numel();
  check(bias, "bias", x, x.scalar_type(), {experts, width});
  const Dtype dtype = device.dtype_of(x, "x");
  const Tensor out = make(x, {rows, width}, x.scalar_type());
  device.run(GroupedBias{x.const_data_ptr(), bias.const_data_ptr(), pointer<int32_t>(ends), rows, width, experts, true,
                         out.mutable_data_ptr()},
             dtype);
  return out;
}

template <typename Device>
void grouped_bias_(const Tensor& x, const Optional& bias_in, const Tensor& ends_in) {
  const Device device(x);
  const Optional bias = dense(bias_in);
  const Tensor ends = dense(ends_in);
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  check_grouped(device, x, "x", ends);
  const int64_t rows = x.size(0), width = x.size(1), experts = ends.numel();
  check(bias, "bias", x, x.scalar_type(), {experts, width});
  const Dtype dtype = device.dtype_of(x, "x");
  device.run(GroupedBias{x.const_data_ptr(), pointer<void>(bias), pointer<int32_t>(ends), rows, width, experts, false,
                         x.mutable_data_ptr()},
             dtype);
}

// Gradients of x and bias; without x, for a forward that did not activate, only the gradient of the bias.
template <typename Device>
std::tuple<Optional, Tensor> grouped_bias_gradients(
    const Tensor& d_out_in, const Optional& x_in, const Optional& bias_in, const Tensor& ends_in) {
  const Device device(d_out_in);
  const Tensor d_out = dense(d_out_in), ends = dense(ends_in);
  const Optional x = dense(x_in), bias = dense(bias_in);
  check_grouped(device, d_out, "d_out", ends);
  const int64_t rows = d_out.size(0), width = d_out.size(1), experts = ends.numel();
  check(x, "x", d_out, d_out.scalar_type(), {rows, width});
  check(bias, "bias", d_out, d_out.scalar_type(), {experts, width});
  const Dtype dtype = device.dtype_of(d_out, "d_out");
  const Optional d_x = x.has_value() ? Optional(make(d_out, {rows, width}, d_out.scalar_type())) : std::nullopt;
  const Tensor d_bias = make(d_out, {experts, width}, d_out.scalar_type());
  const Tensor sums = make(d_out, {num_pieces(rows, experts), width}, ScalarType::Float);
  device.run(GroupedBiasBackward{d_out.const_data_ptr(), pointer<void>(x), pointer<void>(bias), pointer<int32_t>(ends),
                                 rows, width, experts, d_x.has_value() ? d_x->mutable_data_ptr() : nullptr,
                                 d_bias.mutable_data_ptr(), writable<float>(sums)},
             dtype);
  return {d_x, d_bias};
}

template <typename Device>
std::tuple<Tensor, Tensor> grouped_bias_quick_gelu_backward(
    const Tensor& d_out, const Tensor& x, const Tensor& bias, const Tensor& ends) {
  const auto [d_x, d_bias] = grouped_bias_gradients<Device>(d_out, x, bias, ends);
  return {*d_x, d_bias};
}

template <typename Device>
Tensor grouped_bias_backward(const Tensor& d_out, const Tensor& ends) {
  return std::get<1>(grouped_bias_gradients<Device>(d_out, std::nullopt, std::nullopt, ends));
}

// Registers the ops of a binding; called inside STABLE_TORCH_LIBRARY_IMPL with the binding's dispatch key.
template <typename Device, typename Library>
void register_ops(Library& library) {
  library.impl("quick_gelu", TORCH_BOX(&quick_gelu<Device>));
  library.impl("quick_gelu_backward", TORCH_BOX(&quick_gelu_backward<Device>));
  library.impl("grouped_bias_quick_gelu", TORCH_BOX(&grouped_bias_quick_gelu<Device>));
  library.impl("grouped_bias_quick_gelu_backward", TORCH_BOX(&grouped_bias_quick_gelu_backward<Device>));
  library.impl("grouped_bias_", TORCH_BOX(&grouped_bias_<Device>));
  library.impl("grouped_bias_backward", TORCH_BOX(&grouped_bias_backward<Device>));
  library.impl("route_topk", TORCH_BOX(&route_topk<Device>));
  library.impl("route_topk_backward", TORCH_BOX(&route_topk_backward<Device>));
  library.impl("moe_dispatch", TORCH_BOX(&moe_dispatch<Device>));
  library.impl("moe_dispatch_backward", TORCH_BOX(&moe_dispatch_backward<Device>));
  library.impl("moe_combine", TORCH_BOX(&moe_combine<Device>));
  library.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward<Device>));
  library.impl("cross_entropy_inplace_", TORCH_BOX(&cross_entropy_inplace_<Device>));
  library.impl("masked_pixel_loss", TORCH_BOX(&masked_pixel_loss<Device>));
  library.impl("masked_pixel_loss_backward", TORCH_BOX(&masked_pixel_loss_backward<Device>));
}

}  // namespace eve_ds
