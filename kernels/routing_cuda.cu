// Launches of routing.cuh.

#include <algorithm>
#include <type_traits>

#include "routing.cuh"

namespace eve_ds {
namespace {

constexpr int kRowThreads = kRowWarps * kWarp;

unsigned as_blocks(int64_t count) { return static_cast<unsigned>(count); }

const char* launch_choose(const Route& args, void* stream) {
  int threads = kChunkThreads;
  while (threads / kWarp * args.experts > kBlockScores) threads /= 2;
  const unsigned blocks = as_blocks(std::max(num_chunks(args.tokens), int64_t{1}));
  return launch(choose_kernel, blocks, threads, stream, args);
}

const char* launch_add_chunks(const float* sums, int64_t chunks, int64_t count, float* total, void* stream) {
  return launch(add_chunks_kernel, blocks_for(count, kWarp), kChunkThreads, stream, sums, chunks, count, total);
}

// Calls `launch` with the number of choices that a kernel is built for; 0 means any number.
template <typename Launch>
const char* with_choices(int64_t top_k, const Launch& launch) {
  if (top_k == 1) return launch(std::integral_constant<int, 1>{});
  if (top_k == 2) return launch(std::integral_constant<int, 2>{});
  return launch(std::integral_constant<int, 0>{});
}

const char* launch_dispatch_backward_embedding(const DispatchBackward& args, Dtype dtype, bool aligned, void* stream) {
  const int64_t chunks = num_embedding_chunks(args.tokens);
  const char* error = with_row_type(dtype, aligned, [&](auto row) {
    using Row = decltype(row);
    const unsigned columns = blocks_for(args.width, kWarp * Row::kValues);
    const dim3 grid(as_blocks(chunks), columns, blocks_for(args.modalities, kModalities));
    return with_choices(args.top_k, [&](auto choices) {
      const auto kernel = dispatch_backward_embedding_kernel<typename Row::Value, Row::kValues, choices()>;
      return launch(kernel, grid, kRowThreads, stream, args);
    });
  });
  if (error != nullptr) return error;
  return launch_add_chunks(args.chunk_d_embedding, chunks, args.modalities * args.width, args.d_embedding, stream);
}

}  // namespace

const char* launch_route(const Route& args, void* stream) {
  const int64_t chunks = num_chunks(args.tokens);
  const char* error = launch_choose(args, stream);
  if (error == nullptr) error = launch(number_rows_kernel, 1, kChunkThreads, stream, args, chunks);
  if (error == nullptr) error = launch(place_kernel, as_blocks(chunks), kChunkTokens, stream, args);
  return error;
}

const char* launch_route_backward(const RouteBackward& args, void* stream) {
  const int64_t chunks = num_chunks(args.tokens);
  const char* error = launch(route_backward_kernel, as_blocks(chunks), kChunkThreads, stream, args);
  if (error != nullptr || args.d_bias == nullptr) return error;
  return launch_add_chunks(args.chunk_d_bias, chunks, args.modalities * args.experts, args.d_bias, stream);
}

const char* launch_dispatch(const Dispatch& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.width * size_of(dtype), args.x, args.out, args.modality_embedding);
  return with_row_type(dtype, aligned, [&](auto row) {
    const auto kernel = dispatch_kernel<typename decltype(row)::Value, decltype(row)::kValues>;
    return launch(kernel, blocks_for(args.rows, kRowWarps), kRowThreads, stream, args);
  });
}

const char* launch_dispatch_backward(const DispatchBackward& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.width * size_of(dtype), args.d_rows, args.d_x);
  if (args.d_embedding != nullptr) return launch_dispatch_backward_embedding(args, dtype, aligned, stream);
  return with_row_type(dtype, aligned, [&](auto row) {
    using Row = decltype(row);
    return with_choices(args.top_k, [&](auto choices) {
      const auto kernel = dispatch_backward_kernel<typename Row::Value, Row::kValues, choices()>;
      return launch(kernel, blocks_for(args.tokens, kRowWarps), kRowThreads, stream, args);
    });
  });
}

const char* launch_combine(const Combine& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.width * size_of(dtype), args.rows, args.out);
  return with_row_type(dtype, aligned, [&](auto row) {
    using Row = decltype(row);
    return with_choices(args.top_k, [&](auto choices) {
      const auto kernel = combine_kernel<typename Row::Value, Row::kValues, choices()>;
      return launch(kernel, blocks_for(args.tokens, kRowWarps), kRowThreads, stream, args);
    });
  });
}

const char* launch_combine_backward(const CombineBackward& args, Dtype dtype, void* stream) {
  const bool aligned = rows_are_aligned(args.width * size_of(dtype), args.d_out, args.expert_rows, args.d_rows);
  return with_row_type(dtype, aligned, [&](auto row) {
    const auto kernel = combine_backward_kernel<typename decltype(row)::Value, decltype(row)::kValues>;
    return launch(kernel, blocks_for(args.tokens + args.rows, kRowWarps), kRowThreads, stream, args);
  });
}

}  // namespace eve_ds
