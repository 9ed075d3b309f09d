// Checks on the GPU, with EVE_DS_CHECK=1, of ids that index memory. A bad id is reported and ends the program before
// the kernel that would use it, because the stream runs that kernel after the check.

#include <cstdio>
#include <cstring>

#include "cuda_launch.h"

namespace eve_ds {

constexpr int kCheckThreads = 256;

// Name of an op's argument; by value, because a kernel cannot read the host's text.
struct Name {
  char text[32];
};

__device__ __forceinline__ void check_id(const Name& name, int64_t at, int64_t id, int64_t lowest, int64_t end) {
  if (id >= lowest && id < end) return;
  printf("eve_ds: %s[%lld] is %lld, which must be at least %lld and below %lld\n", name.text,
         static_cast<long long>(at), static_cast<long long>(id), static_cast<long long>(lowest),
         static_cast<long long>(end));
  __trap();
}

__global__ void check_ids_kernel(const Name name, const int64_t* ids, int64_t count, int64_t lowest, int64_t end) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) check_id(name, i, ids[i], lowest, end);
}

// Checks that no end is smaller than the previous end.
__global__ void check_ends_kernel(const Name name, const int32_t* ends, int64_t experts, int64_t rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < experts) check_id(name, i, ends[i], i > 0 ? ends[i - 1] : 0, rows + 1);
}

const char* launch_check_ids(
    const char* argument, const int64_t* ids, int64_t count, int64_t lowest, int64_t end, void* stream) {
  Name name = {};
  std::strncpy(name.text, argument, sizeof name.text - 1);
  const unsigned blocks = blocks_for(count, kCheckThreads);
  return launch(check_ids_kernel, blocks, kCheckThreads, stream, name, ids, count, lowest, end);
}

const char* launch_check_ends(const int32_t* ends, int64_t experts, int64_t rows, void* stream) {
  const unsigned blocks = blocks_for(experts, kCheckThreads);
  return launch(check_ends_kernel, blocks, kCheckThreads, stream, Name{"ends"}, ends, experts, rows);
}

}  // namespace eve_ds
