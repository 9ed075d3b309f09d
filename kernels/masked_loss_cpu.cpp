// Cross entropy of masked words and squared error of masked pixels on the CPU. Compiled once per
// instruction set into namespace EVE_ISA.

#include <cmath>

#include "cpu_kernels.h"
#include "vector.h"

namespace eve_ds {
namespace EVE_ISA {

namespace {

EVE_INLINE Floats bias_at(const float* bias, int64_t v) { return bias == nullptr ? Floats{} : load(bias + v); }

EVE_INLINE float bias_one(const float* bias, int64_t v) { return bias == nullptr ? 0.0f : bias[v]; }

// Three passes over a row, which stays in the cache: largest logit, sum of exponentials, gradients in place.
template <typename T>
EVE_INLINE float cross_entropy_row(T* logits, const float* bias, int64_t target, int64_t vocabulary) {
  const int64_t whole = vocabulary / kLanes * kLanes, rest = vocabulary - whole;
  Floats tail = broadcast(-INFINITY);
  for (int64_t i = 0; i < rest; ++i) tail[i] = load_one(logits + whole + i) + bias_one(bias, whole + i);
  Floats top = tail;
  for (int64_t v = 0; v < whole; v += kLanes) top = maximum(top, load(logits + v) + bias_at(bias, v));
  const float most = largest(top);
  Floats total = exponential(tail - most);
  for (int64_t v = 0; v < whole; v += kLanes) total += exponential(load(logits + v) + bias_at(bias, v) - most);
  const float denominator = sum(total);
  const float loss = most + std::log(denominator) - load_one(logits + target) - bias_one(bias, target);
  const float inverse = 1.0f / denominator;
  const float probability = std::exp(load_one(logits + target) + bias_one(bias, target) - most) * inverse;
  for (int64_t v = 0; v < whole; v += kLanes)
    store(logits + v, exponential(load(logits + v) + bias_at(bias, v) - most) * inverse);
  store_part(logits + whole, exponential(tail - most) * inverse, rest);
  store_one(logits + target, probability - 1.0f);
  return loss;
}

template <typename T>
void cross_entropy_rows(const CrossEntropy& args, int64_t first, int64_t end) {
  T* logits = static_cast<T*>(args.logits);
  for (int64_t n = first; n < end; ++n)
    args.losses[n] = cross_entropy_row(logits + n * args.vocabulary, args.bias, args.target[n], args.vocabulary);
}

// Pixels of one patch in (row, column, channel) order; the buffer is padded with zeros to whole vectors.
EVE_INLINE void read_patch(const PixelLoss& args, int64_t item, float* buffer) {
  const int64_t size = args.patch_size, width = args.width, plane = args.height * width;
  const int64_t id = args.masked_patch_ids[item], columns = width / size;
  const float* image = args.pixel_values + item / args.masked * 3 * plane;
  const float* corner = image + id / columns * size * width + id % columns * size;
  for (int64_t row = 0; row < size; ++row) {
    const float* red = corner + row * width;
    const float* green = red + plane;
    const float* blue = green + plane;
    float* to = buffer + row * size * 3;
    for (int64_t column = 0; column < size; ++column) {
      to[3 * column] = red[column];
      to[3 * column + 1] = green[column];
      to[3 * column + 2] = blue[column];
    }
  }
}

// The target of a pixel is (pixel - mean) * scale; the defaults give exactly the pixel, bit for bit.
struct Normalization {
  float mean = 0.0f, scale = 1.0f;
};

// Normalization of the patch in the buffer to mean 0 and unbiased variance 1.
EVE_INLINE Normalization normalization_of(const float* patch, int64_t values, float eps) {
  const int64_t whole = values / kLanes * kLanes, rest = values - whole;
  Floats total = load_part(patch + whole, rest, 0.0f);
  for (int64_t v = 0; v < whole; v += kLanes) total += load(patch + v);
  const float mean = sum(total) / static_cast<float>(values);
  Floats squares{};
  for (int64_t v = 0; v < whole; v += kLanes) {
    const Floats centered = load(patch + v) - mean;
    squares += centered * centered;
  }
  const Floats centered = load_part(patch + whole, rest, mean) - mean;
  squares += centered * centered;
  const float variance = sum(squares) / static_cast<float>(values - 1);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

template <typename T>
void pixel_loss_items(const PixelLoss& args, int64_t first, int64_t end) {
  alignas(64) float patch[kMaxPatchSize * kMaxPatchSize * 3 + kLanes];
  const int64_t values = args.patch_size * args.patch_size * 3, whole = values / kLanes * kLanes;
  const int64_t rest = values - whole;
  const T* predictions = static_cast<const T*>(args.predictions);
  for (int64_t item = first; item < end; ++item) {
    read_patch(args, item, patch);
    const auto [mean, scale] = args.normalize ? normalization_of(patch, values, args.eps) : Normalization{};
    const T* predicted = predictions + item * values;
    Floats errors{};
    for (int64_t v = 0; v < whole; v += kLanes) {
      const Floats error = load(predicted + v) - (load(patch + v) - mean) * scale;
      errors += error * error;
    }
    const Floats error =
        load_part(predicted + whole, rest, 0.0f) - (load_part(patch + whole, rest, mean) - mean) * scale;
    errors += error * error;
    args.losses[item] = sum(errors) / static_cast<float>(values);
    args.mean[item] = mean;
    args.scale[item] = scale;
  }
}

template <typename T>
void pixel_loss_backward_items(const PixelLossBackward& args, int64_t first, int64_t end) {
  alignas(64) float patch[kMaxPatchSize * kMaxPatchSize * 3 + kLanes];
  const PixelLoss& forward = args.forward;
  const int64_t values = forward.patch_size * forward.patch_size * 3, whole = values / kLanes * kLanes;
  const int64_t rest = values - whole;
  for (int64_t item = first; item < end; ++item) {
    const T* predicted = static_cast<const T*>(forward.predictions) + item * values;
    T* gradient = static_cast<T*>(args.d_predictions) + item * values;
    const float factor = args.d_losses[item] * 2.0f / static_cast<float>(values);
    const float mean = forward.mean[item], scale = forward.scale[item];
    read_patch(forward, item, patch);
    for (int64_t v = 0; v < whole; v += kLanes)
      store(gradient + v, (load(predicted + v) - (load(patch + v) - mean) * scale) * factor);
    const Floats target = (load_part(patch + whole, rest, mean) - mean) * scale;
    store_part(gradient + whole, (load_part(predicted + whole, rest, 0.0f) - target) * factor, rest);
  }
}

void cross_entropy(const CrossEntropy& args, Dtype dtype, int64_t first, int64_t end) {
  dtype == Dtype::kFloat32 ? cross_entropy_rows<float>(args, first, end) : cross_entropy_rows<BFloat16>(args, first, end);
}

void pixel_loss(const PixelLoss& args, Dtype dtype, int64_t first, int64_t end) {
  dtype == Dtype::kFloat32 ? pixel_loss_items<float>(args, first, end) : pixel_loss_items<BFloat16>(args, first, end);
}

void pixel_loss_backward(const PixelLossBackward& args, Dtype dtype, int64_t first, int64_t end) {
  dtype == Dtype::kFloat32 ? pixel_loss_backward_items<float>(args, first, end)
                           : pixel_loss_backward_items<BFloat16>(args, first, end);
}

}  // namespace

const LossKernels loss_kernels = {cross_entropy, pixel_loss, pixel_loss_backward};

}  // namespace EVE_ISA
}  // namespace eve_ds
