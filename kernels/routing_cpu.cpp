// Routing on the CPU: choose experts, place the routes, copy tokens to rows and back. Compiled once per instruction set
// into namespace EVE_ISA.

#include <cmath>
#include <cstring>

#include "cpu_kernels.h"
#include "vector.h"

namespace eve_ds {
namespace EVE_ISA {

namespace {

EVE_INLINE int64_t first_token(int64_t chunk) { return chunk * kChunkTokens; }

EVE_INLINE int64_t end_token(int64_t chunk, int64_t tokens) {
  const int64_t end = (chunk + 1) * kChunkTokens;
  return end < tokens ? end : tokens;
}

// Lowest index of the largest of `width` scores; width must be a multiple of the lanes.
EVE_INLINE int64_t argmax(const float* scores, int64_t width) {
  Floats best = broadcast(-INFINITY);
  Ints index{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, where = index;
  for (int64_t e = 0; e < width; e += kLanes) {
    const Floats value = load(scores + e);
    const Ints better = value > best;
    best = better ? value : best;
    where = better ? index : where;
    index += static_cast<int32_t>(kLanes);
  }
  const Ints none = Ints{} + INT32_MAX;
  return smallest(best == broadcast(largest(best)) ? where : none);
}

EVE_INLINE void accumulate(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Results above this many bytes bypass the cache, which would have lost them before they are read.
constexpr int64_t kStreamBytes = int64_t{1} << 23;

// Whether rows of a result of shape `rows` x `width` may be streamed.
template <typename T>
EVE_INLINE bool streams(const T* out, int64_t rows, int64_t width) {
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  return rows * row_bytes > kStreamBytes && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

template <bool kStream, typename T>
EVE_INLINE void put(T* to, Floats value) {
  if (kStream)
    stream(to, value);
  else
    store(to, value);
}

// Prefetches a row ahead of its use, because rows lie anywhere in memory.
template <typename T>
EVE_INLINE void prefetch_row(const T* row, int64_t width) {
  const char* from = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(from + byte);
}

template <bool kStream>
EVE_INLINE void copy_row(void* to, const void* from, int64_t bytes) {
  if (!kStream) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (int64_t word = 0; word < bytes / 4; word += kLanes)  // streamed rows are whole vectors
    stream(static_cast<float*>(to) + word, load(static_cast<const float*>(from) + word));
}

// to = scale * from; returns the dot product of from and other. One pass, in fp32.
template <bool kStream, typename T>
EVE_INLINE float scale_and_dot(T* to, const T* from, const T* other, float scale, int64_t width) {
  Floats even{}, odd{};  // two sums, so that an addition need not wait for the previous one
  int64_t d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    const Floats a = load(from + d), b = load(from + d + kLanes);
    even += a * load(other + d);
    odd += b * load(other + d + kLanes);
    put<kStream>(to + d, a * scale);
    put<kStream>(to + d + kLanes, b * scale);
  }
  float rest = 0.0f;
  for (; d < width; ++d) {
    const float value = load_one(from + d);
    rest += value * load_one(other + d);
    store_one(to + d, value * scale);
  }
  return sum(even + odd) + rest;
}

void route_choose(const Route& route, int64_t first_chunk, int64_t end_chunk) {
  const int64_t experts = route.experts, top_k = route.top_k;
  const int64_t width = (experts + kLanes - 1) / kLanes * kLanes;
  const int64_t chunks = num_chunks(route.tokens);
  alignas(64) float scores[kMaxExperts];
  alignas(64) float exponentials[kMaxExperts];
  alignas(64) float sums[kMaxExperts];
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    for (int64_t k = 0; k < top_k; ++k)
      std::memset(route.chunk_counts + (k * chunks + chunk) * experts, 0, experts * sizeof(int32_t));
    std::memset(sums, 0, width * sizeof(float));
    float z_sum = 0.0f;
    for (int64_t t = first_token(chunk); t < end_token(chunk, route.tokens); ++t) {
      const bool valid = route.valid == nullptr || route.valid[t];
      const float* logits = route.logits + t * experts;
      std::memcpy(scores, logits, experts * sizeof(float));
      for (int64_t e = experts; e < width; ++e) scores[e] = -INFINITY;
      if (route.modality_bias != nullptr)
        accumulate(scores, route.modality_bias + route.modality_ids[t] * experts, experts);

      Floats top = broadcast(-INFINITY);
      for (int64_t e = 0; e < width; e += kLanes) top = maximum(top, load(scores + e));
      const float most = largest(top);
      Floats total{};
      for (int64_t e = 0; e < width; e += kLanes) {
        const Floats value = exponential(load(scores + e) - most);
        store(exponentials + e, value);
        total += value;
      }
      const float denominator = sum(total);
      const float inverse = 1.0f / denominator;
      const float log_sum_exp = most + std::log(denominator);
      for (int64_t e = 0; e < width; e += kLanes) {
        const Floats probability = load(exponentials + e) * inverse;
        store(exponentials + e, probability);
        if (valid) store(sums + e, load(sums + e) + probability);
      }
      std::memcpy(route.probabilities + t * experts, exponentials, experts * sizeof(float));
      route.log_sum_exp[t] = log_sum_exp;
      if (valid) z_sum += log_sum_exp * log_sum_exp;

      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t expert = argmax(scores, width);
        route.expert_ids[t * top_k + k] = expert;
        route.gates[t * top_k + k] = exponentials[expert];
        if (valid) ++route.chunk_counts[(k * chunks + chunk) * experts + expert];
        if (k + 1 == top_k) break;
        if (k == 0 && route.noise != nullptr) {
          accumulate(scores, route.noise + t * experts, experts);
        }
        scores[expert] = -INFINITY;
      }
    }
    float* chunk_sums = route.chunk_sums + chunk * (experts + 1);
    std::memcpy(chunk_sums, sums, experts * sizeof(float));
    chunk_sums[experts] = z_sum;
  }
}

void route_place(const Route& route, int64_t first_chunk, int64_t end_chunk) {
  const int64_t experts = route.experts, top_k = route.top_k, chunks = num_chunks(route.tokens);
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    const int64_t end = end_token(chunk, route.tokens);
    for (int64_t k = 0; k < top_k; ++k) {
      int32_t* next = route.chunk_counts + (k * chunks + chunk) * experts;
      for (int64_t t = first_token(chunk); t < end; ++t) {
        const int64_t route_id = t * top_k + k, expert = route.expert_ids[route_id];
        int64_t slot = -1;
        if (route.valid == nullptr || route.valid[t]) {
          slot = next[expert]++;
          if (route.capacity >= 0 && slot >= (expert + 1) * route.capacity) slot = -1;
        }
        route.slots[route_id] = slot;
        if (slot >= 0) route.source[slot] = t;
      }
    }
    for (int64_t t = first_token(chunk); t < end; ++t) {
      float* gates = route.gates + t * top_k;
      const int64_t* slots = route.slots + t * top_k;
      float total = 0.0f;
      for (int64_t k = 0; k < top_k; ++k) {
        gates[k] = slots[k] >= 0 ? gates[k] : 0.0f;
        total += gates[k];
      }
      if (top_k > 1) {
        const float divisor = total > 1.1920929e-07f ? total : 1.1920929e-07f;
        for (int64_t k = 0; k < top_k; ++k) gates[k] /= divisor;
      }
    }
  }
}

void route_backward(const RouteBackward& route, int64_t first_chunk, int64_t end_chunk) {
  const int64_t experts = route.experts, top_k = route.top_k;
  const float d_z_sum = route.d_z_sum != nullptr ? *route.d_z_sum : 0.0f;
  alignas(64) float d_probabilities[kMaxExperts];
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    float* chunk_d_bias = nullptr;
    if (route.chunk_d_bias != nullptr) {
      chunk_d_bias = route.chunk_d_bias + chunk * route.modalities * experts;
      std::memset(chunk_d_bias, 0, route.modalities * experts * sizeof(float));
    }
    for (int64_t t = first_token(chunk); t < end_token(chunk, route.tokens); ++t) {
      float* d_logits = route.d_logits + t * experts;
      if (route.valid != nullptr && !route.valid[t]) {
        std::memset(d_logits, 0, experts * sizeof(float));
        continue;
      }
      const float* p = route.probabilities + t * experts;
      if (route.d_probability_sum != nullptr)
        std::memcpy(d_probabilities, route.d_probability_sum, experts * sizeof(float));
      else
        std::memset(d_probabilities, 0, experts * sizeof(float));
      if (route.d_gates != nullptr) {
        const float* gates = route.gates + t * top_k;
        const float* d_gates = route.d_gates + t * top_k;
        const int64_t* slots = route.slots + t * top_k;
        const int64_t* expert_ids = route.expert_ids + t * top_k;
        float total = 0.0f, mean = 0.0f;
        for (int64_t k = 0; k < top_k; ++k) {
          if (slots[k] < 0) continue;
          total += p[expert_ids[k]];
          mean += d_gates[k] * gates[k];
        }
        // A gate is p / max(total, 1.19e-07), so the divisor can be constant; the gate of a single choice is p itself.
        const bool constant = total < 1.1920929e-07f;
        const float inverse = top_k == 1 ? 1.0f : 1.0f / (constant ? 1.1920929e-07f : total);
        if (top_k == 1 || constant) mean = 0.0f;
        for (int64_t k = 0; k < top_k; ++k)
          if (slots[k] >= 0) d_probabilities[expert_ids[k]] += (d_gates[k] - mean) * inverse;
      }
      Floats lanes{};
      int64_t e = 0;
      for (; e + kLanes <= experts; e += kLanes) lanes += load(p + e) * load(d_probabilities + e);
      float inner = 0.0f;
      for (; e < experts; ++e) inner += p[e] * d_probabilities[e];
      inner += sum(lanes);
      const float shift = 2.0f * route.log_sum_exp[t] * d_z_sum - inner;
      for (e = 0; e < experts; ++e) d_logits[e] = p[e] * (d_probabilities[e] + shift);
      if (chunk_d_bias != nullptr) accumulate(chunk_d_bias + route.modality_ids[t] * experts, d_logits, experts);
    }
  }
}

template <bool kStream, typename T>
EVE_INLINE void fill_row(T* row, const T* from, const float* embedding, int64_t width) {
  if (embedding == nullptr) {
    copy_row<kStream>(row, from, width * static_cast<int64_t>(sizeof(T)));
    return;
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) {  // all loads precede the stores, which might alias them
    Floats values[4];
    for (int64_t i = 0; i < 4; ++i) values[i] = load(from + d + i * kLanes) + load(embedding + d + i * kLanes);
    for (int64_t i = 0; i < 4; ++i) put<kStream>(row + d + i * kLanes, values[i]);
  }
  for (; d + kLanes <= width; d += kLanes) put<kStream>(row + d, load(from + d) + load(embedding + d));
  for (; d < width; ++d) store_one(row + d, load_one(from + d) + embedding[d]);
}

template <bool kStream, typename T>
void dispatch_range(const Dispatch& args, int64_t first_row, int64_t end_row) {
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out);
  const int64_t width = args.width;
  for (int64_t r = first_row; r < end_row; ++r) {
    const int64_t token = args.source[r];
    if (r + 1 < end_row && args.source[r + 1] >= 0) prefetch_row(x + args.source[r + 1] * width, width);
    if (token < 0) {
      std::memset(out + r * width, 0, width * sizeof(T));
      continue;
    }
    const float* embedding =
        args.modality_embedding == nullptr ? nullptr : args.modality_embedding + args.modality_ids[token] * width;
    fill_row<kStream>(out + r * width, x + token * width, embedding, width);
  }
  if (kStream) stream_fence();
}

template <typename T>
void dispatch_rows(const Dispatch& args, int64_t first_row, int64_t end_row) {
  if (streams(static_cast<const T*>(args.out), args.rows, args.width))
    dispatch_range<true, T>(args, first_row, end_row);
  else
    dispatch_range<false, T>(args, first_row, end_row);
}

// Kept rows of a token, with their gates; also prefetches the rows of the next token.
template <typename T>
struct KeptRows {
  const T* rows[kMaxTopK];
  float gates[kMaxTopK];
  int64_t count = 0;

  EVE_INLINE KeptRows(const T* all, const int64_t* slots, const float* all_gates, int64_t token, int64_t tokens,
                      int64_t top_k, int64_t width) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t slot = slots[token * top_k + k];
      if (slot >= 0) {
        rows[count] = all + slot * width;
        gates[count++] = all_gates == nullptr ? 1.0f : all_gates[token * top_k + k];
      }
      if (token + 1 < tokens && slots[(token + 1) * top_k + k] >= 0)
        prefetch_row(all + slots[(token + 1) * top_k + k] * width, width);
    }
  }
};

template <typename T>
void dispatch_backward_chunks(const DispatchBackward& args, int64_t first_chunk, int64_t end_chunk) {
  const T* d_rows = static_cast<const T*>(args.d_rows);
  T* d_x = static_cast<T*>(args.d_x);
  const int64_t width = args.width;
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    float* chunk_sums = nullptr;
    if (args.chunk_d_embedding != nullptr) {
      chunk_sums = args.chunk_d_embedding + chunk * args.modalities * width;
      std::memset(chunk_sums, 0, args.modalities * width * sizeof(float));
    }
    for (int64_t t = first_token(chunk); t < end_token(chunk, args.tokens); ++t) {
      const KeptRows<T> kept(d_rows, args.slots, nullptr, t, args.tokens, args.top_k, width);
      T* to = d_x + t * width;
      float* sums = chunk_sums == nullptr ? nullptr : chunk_sums + args.modality_ids[t] * width;
      int64_t d = 0;
      for (; d + kLanes <= width; d += kLanes) {
        Floats total{};
        for (int64_t k = 0; k < kept.count; ++k) total += load(kept.rows[k] + d);
        store(to + d, total);
        if (sums != nullptr) store(sums + d, load(sums + d) + total);
      }
      for (; d < width; ++d) {
        float total = 0.0f;
        for (int64_t k = 0; k < kept.count; ++k) total += load_one(kept.rows[k] + d);
        store_one(to + d, total);
        if (sums != nullptr) sums[d] += total;
      }
    }
  }
}

template <typename T>
void combine_chunks(const Combine& args, int64_t first_chunk, int64_t end_chunk) {
  T* out = static_cast<T*>(args.out);
  const int64_t width = args.width;
  for (int64_t t = first_token(first_chunk); t < end_token(end_chunk - 1, args.tokens); ++t) {
    const KeptRows<T> kept(static_cast<const T*>(args.rows), args.slots, args.gates, t, args.tokens, args.top_k, width);
    T* to = out + t * width;
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      Floats total{};
      for (int64_t k = 0; k < kept.count; ++k) total += load(kept.rows[k] + d) * kept.gates[k];
      store(to + d, total);
    }
    for (; d < width; ++d) {
      float total = 0.0f;
      for (int64_t k = 0; k < kept.count; ++k) total += load_one(kept.rows[k] + d) * kept.gates[k];
      store_one(to + d, total);
    }
  }
}

template <bool kStream, typename T>
void combine_backward_range(const CombineBackward& args, int64_t first_chunk, int64_t end_chunk) {
  const T* d_out = static_cast<const T*>(args.d_out);
  const T* expert_rows = static_cast<const T*>(args.expert_rows);
  T* d_rows = static_cast<T*>(args.d_rows);
  const int64_t width = args.width, top_k = args.top_k;
  for (int64_t t = first_token(first_chunk); t < end_token(end_chunk - 1, args.tokens); ++t) {
    const T* upstream = d_out + t * width;
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t slot = args.slots[t * top_k + k];
      if (t + 1 < args.tokens && args.slots[(t + 1) * top_k + k] >= 0)
        prefetch_row(expert_rows + args.slots[(t + 1) * top_k + k] * width, width);
      if (slot < 0) {
        args.d_gates[t * top_k + k] = 0.0f;
        continue;
      }
      args.d_gates[t * top_k + k] = scale_and_dot<kStream>(d_rows + slot * width, upstream, expert_rows + slot * width,
                                                           args.gates[t * top_k + k], width);
    }
  }
  if (kStream) stream_fence();
}

template <typename T>
void combine_backward_chunks(const CombineBackward& args, int64_t first_chunk, int64_t end_chunk) {
  if (streams(static_cast<const T*>(args.d_rows), args.rows, args.width))
    combine_backward_range<true, T>(args, first_chunk, end_chunk);
  else
    combine_backward_range<false, T>(args, first_chunk, end_chunk);
}

template <typename T>
void zero_empty_rows_of(const CombineBackward& args, int64_t first_row, int64_t end_row) {
  T* d_rows = static_cast<T*>(args.d_rows);
  for (int64_t r = first_row; r < end_row; ++r)
    if (args.source[r] < 0) std::memset(d_rows + r * args.width, 0, args.width * sizeof(T));
}

#define EVE_BY_DTYPE(name, function, Arguments)                                     \
  void name(const Arguments& args, Dtype dtype, int64_t first, int64_t end) {       \
    if (dtype == Dtype::kFloat32)                                                   \
      function<float>(args, first, end);                                            \
    else                                                                            \
      function<BFloat16>(args, first, end);                                         \
  }

EVE_BY_DTYPE(dispatch, dispatch_rows, Dispatch)
EVE_BY_DTYPE(dispatch_backward, dispatch_backward_chunks, DispatchBackward)
EVE_BY_DTYPE(combine, combine_chunks, Combine)
EVE_BY_DTYPE(combine_backward, combine_backward_chunks, CombineBackward)
EVE_BY_DTYPE(zero_empty_rows, zero_empty_rows_of, CombineBackward)

}  // namespace

const RoutingKernels routing_kernels = {route_choose,      route_place, route_backward,   dispatch,
                                        dispatch_backward, combine,     combine_backward, zero_empty_rows};

}  // namespace EVE_ISA
}  // namespace eve_ds
