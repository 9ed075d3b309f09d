// Arguments of the plain functions behind the ops. This file has no torch: the bindings fill in the structs, and the
// CPU and CUDA sources read them. Matrices are row-major and contiguous. A null pointer means that an optional argument
// was not given; the id -1 means "none". ../eve_ds/ops/reference.py defines the contracts of the ops.
#pragma once

#include <cstdint>

namespace eve_ds {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Number of tokens per chunk. Sums over tokens are taken in token order within a chunk, and then over chunks in a fixed
// order, so a result depends neither on the number of threads nor on their timing.
constexpr int64_t kChunkTokens = 256;
constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxTopK = 16;

inline int64_t num_chunks(int64_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }

// Number of rows per chunk in sums over rows that are ordered by expert. Where an expert ends inside a chunk, the chunk
// is split into pieces. The piece of chunk c and expert e has index c + e, which is unique because from one piece to
// the next, c or e or both increase.
constexpr int64_t kChunkRows = 128;

inline int64_t num_row_chunks(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }
inline int64_t num_pieces(int64_t rows, int64_t experts) { return num_row_chunks(rows) + experts; }

// T tokens, E experts, K choices, R rows of the expert buffer, M modalities, C chunks.
struct Route {
  const float* logits;          // (T, E)
  const float* modality_bias;   // (M, E) or null
  const int64_t* modality_ids;  // (T,) or null
  const bool* valid;            // (T,) or null: all tokens are valid
  const float* noise;           // (T, E) or null
  int64_t tokens, experts, top_k;
  int64_t capacity;  // rows per expert; negative: rows are packed by expert
  int64_t rows;      // R
  int64_t* expert_ids;     // (T, K)
  int64_t* slots;          // (T, K)
  float* gates;            // (T, K)
  int64_t* source;         // (R,)
  int64_t* counts;         // (E,)
  float* probabilities;    // (T, E)
  float* log_sum_exp;      // (T,)
  float* first_choices;    // (E,)
  float* probability_sum;  // (E,)
  float* z_sum;            // () sum over valid tokens of log_sum_exp^2
  float* chunk_sums;       // (C, E + 1) workspace: probabilities and log_sum_exp^2
  int32_t* chunk_counts;   // (K, C, E) workspace: number of routes by choice, later the first row of each chunk
};

struct RouteBackward {
  const float* probabilities;      // (T, E)
  const float* log_sum_exp;        // (T,)
  const int64_t* expert_ids;       // (T, K)
  const int64_t* slots;            // (T, K)
  const float* gates;              // (T, K)
  const bool* valid;               // (T,) or null
  const int64_t* modality_ids;     // (T,) or null
  const float* d_gates;            // (T, K) or null
  const float* d_probability_sum;  // (E,) or null
  const float* d_z_sum;            // () or null
  int64_t tokens, experts, top_k, modalities;
  float* d_logits;        // (T, E)
  float* d_bias;          // (M, E) or null
  float* chunk_d_bias;    // (C, M, E) workspace, or null
};

// Rows have the dtype of the op; embeddings and gates are fp32.
struct Dispatch {
  const void* x;                    // (T, D)
  const int64_t* source;            // (R,)
  const float* modality_embedding;  // (M, D) or null
  const int64_t* modality_ids;      // (T,) or null
  int64_t rows, width;
  void* out;  // (R, D)
};

struct DispatchBackward {
  const void* d_rows;           // (R, D)
  const int64_t* slots;         // (T, K)
  const int64_t* modality_ids;  // (T,) or null
  int64_t tokens, top_k, width, modalities;
  void* d_x;               // (T, D)
  float* d_embedding;      // (M, D) or null
  float* chunk_d_embedding;  // (C, M, D) workspace, or null; here the device decides the tokens per chunk
};

struct Combine {
  const void* rows;      // (R, D)
  const int64_t* slots;  // (T, K)
  const float* gates;    // (T, K)
  int64_t tokens, top_k, width;
  void* out;  // (T, D)
};

struct CombineBackward {
  const void* d_out;      // (T, D)
  const void* expert_rows;  // (R, D)
  const int64_t* slots;   // (T, K)
  const int64_t* source;  // (R,)
  const float* gates;     // (T, K)
  int64_t tokens, top_k, width, rows;
  void* d_rows;    // (R, D)
  float* d_gates;  // (T, K)
};

struct CrossEntropy {
  void* logits;           // (N, V), replaced by (softmax - one-hot)
  const float* bias;      // (V,) or null
  const int64_t* target;  // (N,)
  int64_t rows, vocabulary;
  float* losses;  // (N,)
};

struct PixelLoss {
  const float* pixel_values;        // (B, 3, H, W)
  const void* predictions;          // (B, N, P * P * 3)
  const int64_t* masked_patch_ids;  // (B, N)
  int64_t batch, masked, height, width, patch_size;
  float eps;
  bool normalize;  // false: the target is the raw pixels
  float* losses;   // (B, N)
  float* mean;     // (B, N) mean of a patch, or 0: the target is (pixel - mean) * scale
  float* scale;    // (B, N) 1 / standard deviation, or 1
};

struct PixelLossBackward {
  PixelLoss forward;
  const float* d_losses;  // (B, N)
  void* d_predictions;    // (B, N, P * P * 3)
};

struct QuickGelu {
  const void* x;      // (count,)
  const void* d_out;  // (count,) upstream gradient, or null for the forward
  int64_t count;
  void* out;  // (count,) the activation, or the gradient of x
};

// Rows of expert e extend from ends[e - 1] (or 0) to ends[e]; rows past the last end belong to no expert.
struct GroupedBias {
  const void* x;        // (R, F)
  const void* bias;     // (E, F), or null to add nothing
  const int32_t* ends;  // (E,)
  int64_t rows, width, experts;
  bool activate;  // apply quick_gelu after adding the bias
  void* out;      // (R, F), zeros in rows of no expert; may equal x if `activate` is false
};

struct GroupedBiasBackward {
  const void* d_out;    // (R, F)
  const void* x;        // (R, F), or null if the forward did not activate
  const void* bias;     // (E, F), or null if x is
  const int32_t* ends;  // (E,)
  int64_t rows, width, experts;
  void* d_x;          // (R, F), zeros in rows of no expert, or null if x is
  void* d_bias;       // (E, F)
  float* piece_sums;  // (num_pieces, F) workspace
};

}  // namespace eve_ds
