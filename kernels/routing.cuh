// Routing on a GPU: choose experts, number the rows, place the routes, copy tokens to rows and back. A warp works on
// one token or row at a time. One block sums over the tokens of a chunk, and the sums of chunks are added in a fixed
// order, so results repeat bit for bit.
#pragma once

#include "cuda_launch.h"

namespace eve_ds {

constexpr int kChunkThreads = 1024;                // threads of a block that works on a chunk
constexpr int kPlaceWarps = kChunkTokens / kWarp;  // placing uses one thread per token of a chunk
constexpr int kRowWarps = 8;                       // warps per block in kernels that use one warp per token or row
constexpr int kModalities = 2;                     // modalities whose embedding gradients one block sums
constexpr float kSmallestGateSum = 1.1920929e-07f;
static_assert(kMaxTopK <= kWarp, "one lane per choice works on the gates");

struct TokenRange {
  int64_t first, end;
};

__device__ __forceinline__ TokenRange chunk_of(int64_t chunk, int64_t tokens) {
  return {chunk * kChunkTokens, min((chunk + 1) * kChunkTokens, tokens)};
}

// Consecutive tokens of the chunk that this warp works on.
__device__ __forceinline__ TokenRange warp_share(TokenRange chunk) {
  const int64_t tokens = kChunkTokens / (blockDim.x / kWarp), first = chunk.first + warp_id() * tokens;
  return {first, min(first + tokens, chunk.end)};
}

// Column sums of matrix (T, columns) over the tokens of a chunk for which `enters` holds: groups of consecutive tokens
// in parallel, then the groups in order. The whole block calls it, and may have written the matrix just before.
template <typename Enters>
__device__ void sum_chunk(const float* matrix, int columns, TokenRange chunk, const Enters& enters, float* sums) {
  __shared__ float partial[kChunkThreads];
  const int threads = blockDim.x, width = min(columns, threads), groups = min(threads / width, kWarp);
  const int tokens_per_group = (kChunkTokens + groups - 1) / groups, group = threadIdx.x / width;
  const int64_t first = chunk.first + group * tokens_per_group, end = min(first + tokens_per_group, chunk.end);
  for (int base = 0; base < columns; base += width) {
    const int column = base + threadIdx.x % width;
    float total = 0.0f;
    __syncthreads();  // the matrix is written, and no thread reads the last round's partial sums any more
    for (int64_t t = first; t < end && column < columns; ++t)
      if (enters(t)) total += matrix[t * columns + column];
    partial[threadIdx.x] = total;
    __syncthreads();
    if (group > 0 || column >= columns) continue;
    for (int g = 1; g < groups; ++g) total += partial[g * width + threadIdx.x];
    sums[column] = total;
  }
}

// Adds chunk sums (C, n) into (n,). One block per 32 columns: warp w sums every 32nd chunk starting at w; then one warp
// per column adds the sums of the warps as a tree.
__global__ void __launch_bounds__(kChunkThreads, 1)
    add_chunks_kernel(const float* sums, int64_t chunks, int64_t count, float* total) {
  constexpr int kWarps = kChunkThreads / kWarp;
  static_assert(kWarps == kWarp, "a warp per column adds up one sum of each warp");
  __shared__ float per_warp[kWarps][kWarp + 1];  // padded by one, so that a column lies in different banks
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp, mine = first + lane_id();
  float value = 0.0f;
  for (int64_t c = warp_id(); c < chunks && mine < count; c += kWarps) value += sums[c * count + mine];
  per_warp[warp_id()][lane_id()] = value;
  __syncthreads();
  const float column = warp_sum(per_warp[lane_id()][warp_id()]);
  if (lane_id() == 0 && first + warp_id() < count) total[first + warp_id()] = column;
}

// ---- Choose: softmax, experts, and the sums of a chunk ----

// Number of scores that a block holds: one token per warp at least, or all tokens of the warp if there are few experts.
// With many experts a block has fewer warps, each with more tokens.
constexpr int kBlockScores = 8192;

// Larger scores have larger keys; NaN has the largest, as in torch's argmax; -0 and +0 share one key.
__device__ __forceinline__ uint32_t order_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score == score ? key : 0xffffffffu;
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Best {
  float score;
  int expert;
};

// Lowest expert with the largest score. No key is 0, so an existing expert is found whatever the scores are.
__device__ __forceinline__ Best warp_argmax(const float* scores, int experts) {
  uint32_t key = 0, expert = 0;
  for (int e = lane_id(); e < experts; e += kWarp) {
    const uint32_t other = order_key(scores[e]);
    if (other > key) expert = e;
    key = max(key, other);
  }
  const uint32_t top = __reduce_max_sync(kAllLanes, key);
  const uint32_t lowest = __reduce_min_sync(kAllLanes, key == top ? expert : 0xffffffffu);
  return {score_of(top), static_cast<int>(lowest)};
}

__device__ __forceinline__ void write_softmax(const Route& route, int64_t token, const float* scores, float largest) {
  const int experts = static_cast<int>(route.experts);
  float exponentials = 0.0f;
  for (int e = lane_id(); e < experts; e += kWarp) exponentials += expf(scores[e] - largest);
  const float total = warp_sum(exponentials);
  const float inverse = 1.0f / total;
  for (int e = lane_id(); e < experts; e += kWarp)
    route.probabilities[token * experts + e] = expf(scores[e] - largest) * inverse;
  if (lane_id() == 0) route.log_sum_exp[token] = largest + logf(total);
}

// One warp loads the logits of `count` tokens plus the biases of their modalities; each lane loads those of its own
// experts. Loads for several tokens overlap; otherwise each token would wait for memory in turn.
__device__ __forceinline__ void load_scores(const Route& route, int64_t first, int count, float* scores) {
  constexpr int kTogether = 8;
  const int experts = static_cast<int>(route.experts);
  for (int t = 0; t < count; t += kTogether)
    for (int e = lane_id(); e < experts; e += kWarp) {
      float values[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (t + i < count) values[i] = route.logits[(first + t + i) * experts + e];
      if (route.modality_bias != nullptr) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          if (t + i < count) values[i] += route.modality_bias[route.modality_ids[first + t + i] * experts + e];
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (t + i < count) scores[(t + i) * experts + e] = values[i];
    }
}

// Called by one warp after the scores of the token are loaded; a lane reads and writes the scores of its own experts
// only. `counts` belongs to this chunk and choice 0; counts of the next choice are `choice_stride` further on.
__device__ __forceinline__ void choose_experts(
    const Route& route, int64_t token, float* scores, int32_t* counts, int64_t choice_stride) {
  const int experts = static_cast<int>(route.experts), top_k = static_cast<int>(route.top_k);
  const bool valid = route.valid == nullptr || route.valid[token];
  Best best = warp_argmax(scores, experts);
  write_softmax(route, token, scores, best.score);
  for (int k = 0;; ++k) {
    if (lane_id() == 0) {
      route.expert_ids[token * top_k + k] = best.expert;
      if (valid) atomicAdd(counts + k * choice_stride + best.expert, 1);  // integers: the order has no effect
    }
    if (k + 1 == top_k) return;
    for (int e = lane_id(); e < experts; e += kWarp) {
      if (k == 0 && route.noise != nullptr) scores[e] += route.noise[token * experts + e];
      if (e == best.expert) scores[e] = -INFINITY;
    }
    best = warp_argmax(scores, experts);
  }
}

// Sum over a chunk of log_sum_exp^2: each lane of one warp sums its consecutive tokens, then the lanes are summed.
__device__ __forceinline__ float chunk_z_sum(const Route& route, TokenRange chunk) {
  constexpr int kTokensPerLane = kChunkTokens / kWarp;
  const int64_t first = chunk.first + lane_id() * kTokensPerLane;
  float z_sum = 0.0f;
  for (int64_t t = first; t < min(first + kTokensPerLane, chunk.end); ++t)
    if (route.valid == nullptr || route.valid[t]) z_sum += route.log_sum_exp[t] * route.log_sum_exp[t];
  return warp_sum(z_sum);
}

// One block per chunk, and one block if there are no tokens. Fills expert_ids, probabilities, log_sum_exp, chunk_sums,
// and chunk_counts with numbers of routes; sets source to -1.
__global__ void __launch_bounds__(kChunkThreads, 1) choose_kernel(const Route route) {
  __shared__ float block_scores[kBlockScores];
  const int64_t experts = route.experts, chunk_id = blockIdx.x, chunks = gridDim.x;
  const TokenRange chunk = chunk_of(chunk_id, route.tokens);
  for (int64_t row = chunk_id * blockDim.x + threadIdx.x; row < route.rows; row += chunks * blockDim.x)
    route.source[row] = -1;
  if (route.tokens == 0) return;
  int32_t* counts = route.chunk_counts + chunk_id * experts;
  for (int64_t k = 0; k < route.top_k; ++k)
    for (int64_t e = threadIdx.x; e < experts; e += blockDim.x) counts[k * chunks * experts + e] = 0;
  __syncthreads();
  const TokenRange share = warp_share(chunk);
  const int64_t together = kBlockScores / (blockDim.x / kWarp) / experts;
  float* scores = block_scores + warp_id() * together * experts;
  for (int64_t first = share.first; first < share.end; first += together) {
    const int count = static_cast<int>(min(together, share.end - first));
    load_scores(route, first, count, scores);
    for (int i = 0; i < count; ++i)
      choose_experts(route, first + i, scores + i * experts, counts, chunks * experts);
  }
  float* sums = route.chunk_sums + chunk_id * (experts + 1);
  const auto valid = [&](int64_t t) { return route.valid == nullptr || route.valid[t]; };
  sum_chunk(route.probabilities, static_cast<int>(experts), chunk, valid, sums);
  if (warp_id() == 0) {
    const float z_sum = chunk_z_sum(route, chunk);
    if (lane_id() == 0) sums[experts] = z_sum;
  }
}

// ---- Number: the first row of every (choice, chunk, expert) ----

// Replaces `count` numbers, `stride` apart, by `start` plus the sum of the numbers before each; called by one warp.
__device__ void number_in_place(int32_t* numbers, int64_t count, int64_t stride, int32_t start) {
  for (int64_t base = 0; base < count; base += kWarp) {
    int32_t* mine = numbers + (base + lane_id()) * stride;
    const bool inside = base + lane_id() < count;
    const int32_t number = inside ? *mine : 0;
    int32_t up_to_mine = number;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int32_t before = __shfl_up_sync(kAllLanes, up_to_mine, offset);
      if (lane_id() >= offset) up_to_mine += before;
    }
    if (inside) *mine = start + up_to_mine - number;
    start += __shfl_sync(kAllLanes, up_to_mine, kWarp - 1);
  }
}

// Number of routes of one expert over all choices, and number of first choices among them; called by one warp.
__device__ int32_t count_routes(const Route& route, int64_t chunks, int64_t expert) {
  int32_t first_choices = 0, others = 0;
  for (int64_t cell = lane_id(); cell < route.top_k * chunks; cell += kWarp) {
    const int32_t here = route.chunk_counts[cell * route.experts + expert];
    cell < chunks ? first_choices += here : others += here;
  }
  first_choices = warp_sum(first_choices);
  const int32_t routes = first_choices + warp_sum(others);
  if (lane_id() == 0) {
    route.first_choices[expert] = static_cast<float>(first_choices);
    route.counts[expert] = route.capacity < 0 ? routes : min(static_cast<int64_t>(routes), route.capacity);
  }
  return routes;
}

// One block with a warp per expert, and per column of the chunk sums, which it adds as a tree. Rows of an expert go to
// first choices in token order, then to second choices, and so on. Fills counts, first_choices, probability_sum and
// z_sum, and turns chunk_counts into first rows.
__global__ void __launch_bounds__(kChunkThreads, 1) number_rows_kernel(const Route route, int64_t chunks) {
  __shared__ int32_t starts[kMaxExperts];  // first row of each expert; earlier, the expert's number of routes
  const int64_t experts = route.experts;
  for (int64_t e = warp_id(); e < experts; e += kChunkThreads / kWarp) {
    const int32_t routes = count_routes(route, chunks, e);
    if (lane_id() == 0) starts[e] = route.capacity < 0 ? routes : static_cast<int32_t>(e * route.capacity);
  }
  __syncthreads();
  if (route.capacity < 0 && warp_id() == 0) number_in_place(starts, experts, 1, 0);
  __syncthreads();
  for (int64_t e = warp_id(); e < experts; e += kChunkThreads / kWarp)
    number_in_place(route.chunk_counts + e, route.top_k * chunks, experts, starts[e]);
  for (int64_t e = warp_id(); e <= experts; e += kChunkThreads / kWarp) {
    float total = 0.0f;
    for (int64_t c = lane_id(); c < chunks; c += kWarp) total += route.chunk_sums[c * (experts + 1) + e];
    total = warp_sum(total);
    if (lane_id() == 0) *(e < experts ? route.probability_sum + e : route.z_sum) = total;
  }
}

// ---- Place: rows and gates ----

// Gates of one token; called by one thread.
__device__ void write_gates(const Route& route, int64_t token) {
  const int64_t* slots = route.slots + token * route.top_k;
  const int64_t* expert_ids = route.expert_ids + token * route.top_k;
  const float* probabilities = route.probabilities + token * route.experts;
  float* gates = route.gates + token * route.top_k;
  float total = 0.0f;
  for (int k = 0; k < route.top_k; ++k) {
    gates[k] = slots[k] >= 0 ? probabilities[expert_ids[k]] : 0.0f;
    total += gates[k];
  }
  if (route.top_k == 1) return;
  const float divisor = fmaxf(total, kSmallestGateSum);
  for (int k = 0; k < route.top_k; ++k) gates[k] /= divisor;
}

// Number of earlier tokens of the chunk with the same expert as this thread's token: those in its warp, and those that
// the previous warps counted. The whole block calls it; -1 means no expert.
__device__ int rank_in_chunk(int expert, int experts) {
  __shared__ int16_t per_warp[kPlaceWarps * kMaxExperts];
  for (int i = threadIdx.x; i < kPlaceWarps * experts; i += kChunkTokens) per_warp[i] = 0;
  const unsigned peers = __match_any_sync(kAllLanes, expert);
  int rank = __popc(peers & ((1u << lane_id()) - 1));
  __syncthreads();
  if (expert >= 0 && rank == 0) per_warp[warp_id() * experts + expert] = static_cast<int16_t>(__popc(peers));
  __syncthreads();
  if (expert >= 0)
    for (int w = 0; w < warp_id(); ++w) rank += per_warp[w * experts + expert];
  __syncthreads();  // the next choice clears the counts
  return rank;
}

// One block per chunk, one thread per token; needs the first rows in chunk_counts. Fills slots, source and gates.
__global__ void __launch_bounds__(kChunkTokens) place_kernel(const Route route) {
  const int64_t experts = route.experts, chunks = gridDim.x, chunk_id = blockIdx.x;
  const int64_t token = chunk_id * kChunkTokens + threadIdx.x;
  const bool inside = token < route.tokens;
  const bool routed = inside && (route.valid == nullptr || route.valid[token]);
  for (int64_t k = 0; k < route.top_k; ++k) {
    const int64_t expert = routed ? route.expert_ids[token * route.top_k + k] : -1;
    const int rank = rank_in_chunk(static_cast<int>(expert), static_cast<int>(experts));
    if (!inside) continue;
    int64_t slot = -1;
    if (routed) {
      slot = route.chunk_counts[(k * chunks + chunk_id) * experts + expert] + rank;
      if (route.capacity >= 0 && slot >= (expert + 1) * route.capacity) slot = -1;
    }
    route.slots[token * route.top_k + k] = slot;
    if (slot >= 0) route.source[slot] = token;
  }
  if (inside) write_gates(route, token);
}

// ---- Backward of choose and place ----

// Contribution of a gate of a token to the gradient of its expert's probability. Lane k holds the one of choice k.
struct GateGradient {
  int expert;         // -1 if there is no gate
  float probability;  // of the expert
  float gradient;     // with respect to the probability
};

// A gate is p / max(total, kSmallestGateSum), so the divisor can be constant; a single choice has gate p.
__device__ __forceinline__ GateGradient gate_gradient(const RouteBackward& route, int64_t token) {
  const int64_t i = token * route.top_k + lane_id();
  GateGradient gate = {-1, 0.0f, 0.0f};
  float weighted = 0.0f;
  if (route.d_gates != nullptr && lane_id() < route.top_k && route.slots[i] >= 0) {
    gate.expert = static_cast<int>(route.expert_ids[i]);
    gate.probability = route.probabilities[token * route.experts + gate.expert];
    gate.gradient = route.d_gates[i];
    weighted = gate.gradient * route.gates[i];
  }
  if (route.top_k == 1) return gate;
  const float total = warp_sum(gate.probability), mean = warp_sum(weighted);
  const bool constant = total < kSmallestGateSum;
  const float shifted = gate.gradient - (constant ? 0.0f : mean);
  gate.gradient = gate.expert < 0 ? 0.0f : shifted / (constant ? kSmallestGateSum : total);
  return gate;
}

// Gradient of the logits of one token; called by one warp.
__device__ __forceinline__ void write_d_logits(const RouteBackward& route, int64_t token) {
  const int experts = static_cast<int>(route.experts);
  const float* probabilities = route.probabilities + token * experts;
  float* d_logits = route.d_logits + token * experts;
  if (route.valid != nullptr && !route.valid[token]) {
    for (int e = lane_id(); e < experts; e += kWarp) d_logits[e] = 0.0f;
    return;
  }
  const GateGradient gate = gate_gradient(route, token);
  const auto d_sum = [&](int e) { return route.d_probability_sum != nullptr ? route.d_probability_sum[e] : 0.0f; };
  float inner = gate.probability * gate.gradient;
  for (int e = lane_id(); e < experts; e += kWarp) inner += probabilities[e] * d_sum(e);
  const float d_z_sum = route.d_z_sum != nullptr ? *route.d_z_sum : 0.0f;
  const float shift = 2.0f * route.log_sum_exp[token] * d_z_sum - warp_sum(inner);
  for (int base = 0; base < experts; base += kWarp) {
    const int e = base + lane_id();
    float d_probability = e < experts ? d_sum(e) : 0.0f;
    for (int k = 0; k < route.top_k; ++k) {
      const int expert = __shfl_sync(kAllLanes, gate.expert, k);
      const float gradient = __shfl_sync(kAllLanes, gate.gradient, k);
      if (expert == e) d_probability += gradient;
    }
    if (e < experts) d_logits[e] = probabilities[e] * (d_probability + shift);
  }
}

// One block per chunk. It sums the bias gradient of a modality over d_logits, which it reads again from the cache.
__global__ void __launch_bounds__(kChunkThreads, 1) route_backward_kernel(const RouteBackward route) {
  const int64_t chunk_id = blockIdx.x;
  const TokenRange chunk = chunk_of(chunk_id, route.tokens), share = warp_share(chunk);
  for (int64_t t = share.first; t < share.end; ++t) write_d_logits(route, t);
  if (route.chunk_d_bias == nullptr) return;
  for (int64_t modality = 0; modality < route.modalities; ++modality) {
    const auto mine = [&](int64_t t) { return route.modality_ids[t] == modality; };
    float* sums = route.chunk_d_bias + (chunk_id * route.modalities + modality) * route.experts;
    sum_chunk(route.d_logits, static_cast<int>(route.experts), chunk, mine, sums);
  }
}

// ---- Dispatch ----

// One warp per row.
template <typename T, int N>
__global__ void __launch_bounds__(kRowWarps * kWarp, 4) dispatch_kernel(const Dispatch args) {
  const int64_t row = global_warp_id();
  if (row >= args.rows) return;
  const int64_t token = args.source[row];
  const T* from = static_cast<const T*>(args.x) + token * args.width;
  T* to = static_cast<T*>(args.out) + row * args.width;
  const float* embedding = nullptr;
  if (token >= 0 && args.modality_embedding != nullptr)
    embedding = args.modality_embedding + args.modality_ids[token] * args.width;
  for (int64_t d = lane_id() * N; d < args.width; d += kWarp * N) {
    float values[N] = {}, added[N];
    if (token >= 0) load<N>(from + d, values);
    if (embedding != nullptr) {
      load<N>(embedding + d, added);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += added[i];
    }
    store<N>(to + d, values);
  }
}

// ---- Sums of a token's rows: combine, and the backward of dispatch ----

// Rows of a token. With K > 0 their K ids are read once and stay in registers; K = 0 supports any number.
template <int K>
struct Slots {
  int64_t values[K];

  __device__ __forceinline__ Slots(const int64_t* slots, int64_t token, int64_t) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = slots[token * K + k];
  }
  __device__ __forceinline__ int count() const { return K; }
  __device__ __forceinline__ int64_t operator[](int k) const { return values[k]; }
};

template <>
struct Slots<0> {
  const int64_t* values;
  int number;

  __device__ __forceinline__ Slots(const int64_t* slots, int64_t token, int64_t top_k)
      : values(slots + token * top_k), number(static_cast<int>(top_k)) {}
  __device__ __forceinline__ int count() const { return number; }
  __device__ __forceinline__ int64_t operator[](int k) const { return values[k]; }
};

// Adds column d of a token's rows, each times its gate, to `total` in order. All K loads overlap.
template <typename T, int N, int K, typename Gate>
__device__ __forceinline__ void add_rows(
    const Slots<K>& slots, const Gate& gate, const void* rows, int64_t width, int64_t d, float (&total)[N]) {
  constexpr int kTogether = K > 0 ? K : 1;
  for (int first = 0; first < slots.count(); first += kTogether) {
    float values[kTogether][N];
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (slots[first + k] >= 0) load<N>(static_cast<const T*>(rows) + slots[first + k] * width + d, values[k]);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (slots[first + k] < 0) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += gate(first + k) * values[k][i];
    }
  }
}

// One warp per token.
template <typename T, int N, int K>
__global__ void __launch_bounds__(kRowWarps * kWarp, 4) combine_kernel(const Combine args) {
  const int64_t token = global_warp_id(), width = args.width;
  if (token >= args.tokens) return;
  const Slots<K> slots(args.slots, token, args.top_k);
  const float* gates = args.gates + token * args.top_k;
  float kept[K > 0 ? K : 1];
#pragma unroll
  for (int k = 0; k < K; ++k) kept[k] = gates[k];
  const auto gate = [&](int k) { return K > 0 ? kept[k] : gates[k]; };
  for (int64_t d = lane_id() * N; d < width; d += kWarp * N) {
    float total[N] = {};
    add_rows<T, N, K>(slots, gate, args.rows, width, d, total);
    store<N>(static_cast<T*>(args.out) + token * width + d, total);
  }
}

// One warp per token, if no embedding needs a gradient.
template <typename T, int N, int K>
__global__ void __launch_bounds__(kRowWarps * kWarp, 4) dispatch_backward_kernel(const DispatchBackward args) {
  const int64_t token = global_warp_id(), width = args.width;
  if (token >= args.tokens) return;
  const Slots<K> slots(args.slots, token, args.top_k);
  for (int64_t d = lane_id() * N; d < width; d += kWarp * N) {
    float total[N] = {};
    add_rows<T, N, K>(slots, [](int) { return 1.0f; }, args.d_rows, width, d, total);
    store<N>(static_cast<T*>(args.d_x) + token * width + d, total);
  }
}

// One block per (kEmbeddingTokens tokens, 32 N columns, kModalities modalities). Each warp sums its consecutive tokens
// for each modality; then the block adds the warps in order.
template <typename T, int N, int K>
__global__ void __launch_bounds__(kRowWarps * kWarp, 4) dispatch_backward_embedding_kernel(const DispatchBackward args) {
  constexpr int kTokens = kEmbeddingTokens / kRowWarps;
  static_assert(kWarp * N <= kRowWarps * kWarp, "a thread per column adds up the warps");
  __shared__ float partial[kModalities][kRowWarps][kWarp * N];
  const int64_t chunk = blockIdx.x, first_column = static_cast<int64_t>(blockIdx.y) * kWarp * N;
  const int64_t width = args.width, d = first_column + lane_id() * N;
  const int64_t first_modality = static_cast<int64_t>(blockIdx.z) * kModalities;
  const int64_t first = chunk * kEmbeddingTokens + warp_id() * kTokens, end = min(first + kTokens, args.tokens);
  float sums[kModalities][N] = {};
  for (int64_t t = first; t < end && d < width; ++t) {
    const int64_t modality = args.modality_ids[t] - first_modality;
    const Slots<K> slots(args.slots, t, args.top_k);
    if (modality < 0 || modality >= kModalities) continue;
    float total[N] = {};
    add_rows<T, N, K>(slots, [](int) { return 1.0f; }, args.d_rows, width, d, total);
    store<N>(static_cast<T*>(args.d_x) + t * width + d, total);
#pragma unroll
    for (int m = 0; m < kModalities; ++m)
#pragma unroll
      for (int i = 0; i < N; ++i) sums[m][i] += modality == m ? total[i] : 0.0f;
  }
#pragma unroll
  for (int m = 0; m < kModalities; ++m)
#pragma unroll
    for (int i = 0; i < N; ++i) partial[m][warp_id()][lane_id() * N + i] = sums[m][i];
  __syncthreads();
  const int64_t column = first_column + threadIdx.x;
  if (threadIdx.x >= kWarp * N || column >= width) return;
  for (int m = 0; m < kModalities && first_modality + m < args.modalities; ++m) {
    float total = 0.0f;
    for (int w = 0; w < kRowWarps; ++w) total += partial[m][w][threadIdx.x];
    args.chunk_d_embedding[(chunk * args.modalities + first_modality + m) * width + column] = total;
  }
}

// ---- Backward of combine ----

// Writes the scaled gradient of a token into one of its rows and returns this lane's part of their dot product.
template <typename T, int N>
__device__ __forceinline__ float combine_backward_of_route(
    const CombineBackward& args, const T* d_out, int64_t slot, float gate) {
  const T* expert_row = static_cast<const T*>(args.expert_rows) + slot * args.width;
  T* d_row = static_cast<T*>(args.d_rows) + slot * args.width;
  float dot = 0.0f;
  for (int64_t d = lane_id() * N; d < args.width; d += kWarp * N) {
    float upstream[N], values[N];
    load<N>(d_out + d, upstream);
    load<N>(expert_row + d, values);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dot += upstream[i] * values[i];
      upstream[i] *= gate;
    }
    store<N>(d_row + d, upstream);
  }
  return dot;
}

// One warp per token, then one warp per row to clear the empty rows.
template <typename T, int N>
__global__ void __launch_bounds__(kRowWarps * kWarp, 4) combine_backward_kernel(const CombineBackward args) {
  const int64_t token = global_warp_id(), row = token - args.tokens;
  if (row >= args.rows) return;
  if (row >= 0) {
    if (args.source[row] >= 0) return;
    const float zeros[N] = {};
    for (int64_t d = lane_id() * N; d < args.width; d += kWarp * N)
      store<N>(static_cast<T*>(args.d_rows) + row * args.width + d, zeros);
    return;
  }
  const T* d_out = static_cast<const T*>(args.d_out) + token * args.width;
  for (int64_t i = token * args.top_k; i < (token + 1) * args.top_k; ++i) {
    const int64_t slot = args.slots[i];
    float dot = 0.0f;
    if (slot >= 0) dot = warp_sum(combine_backward_of_route<T, N>(args, d_out, slot, args.gates[i]));
    if (lane_id() == 0) args.d_gates[i] = dot;
  }
}

}  // namespace eve_ds
