// Between two steps of sequences: new rows into the cache, the likeliest tokens, and what the next step reads.
//
// Shape letters: B batch, S new tokens, N slots, C capacity, K rows of logits, V vocab.
#include <cuda_runtime.h>

#include <cfloat>

#include "launch.cuh"
#include "mythos_cuda.h"
#include "numbers.cuh"

namespace mythos::cuda {
namespace {

constexpr int kCopyThreads = 64;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kParts = 64;  // of a row of logits

// Blocks: (S, B, N). Piece: what rows consist of whole ones of.
template <typename Piece>
__global__ void __launch_bounds__(kCopyThreads) append(mythos_cuda_append a) {
  wait_for_previous();
  const int s = blockIdx.x, sequence = blockIdx.y;
  const int64_t slot = blockIdx.z, past = a.past_len[sequence];
  const int64_t count = a.counts[sequence];
  if (s >= count || s < count - a.capacity || past < 0) return;  // of more rows than there is room for, the last ones
  const int64_t pieces = a.row_bytes / int64_t(sizeof(Piece)), to = int64_t((uint64_t(past) + s) % uint64_t(a.capacity));
  const Piece* from = static_cast<const Piece*>(a.new_rows) + ((slot * a.batch + sequence) * a.seq + s) * pieces;
  Piece* row = static_cast<Piece*>(a.rows) + ((slot * a.batch + sequence) * a.capacity + to) * pieces;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < pieces; i += kCopyThreads) row[i] = from[i];
}

template <typename Piece>
cudaError_t launch_append(const mythos_cuda_append& a, cudaStream_t stream) {
  return launch_kernel(append<Piece>, dim3(a.seq, a.batch, a.slots), kCopyThreads, 0, stream, a);
}

// The largest of some logits, the lowest index among equals, and the sum of exp(logit - largest).
struct Best {
  float value, sum;
  int index;

  __device__ __forceinline__ void add(const Best& other) {
    const float most = fmaxf(value, other.value);
    sum = sum * expf(value - most) + other.sum * expf(other.value - most);
    if (other.value > value || (other.value == value && other.index < index)) index = other.index;
    value = most;
  }
};

__device__ __forceinline__ Best best_of_warp(Best mine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    mine.add({__shfl_xor_sync(0xffffffffu, mine.value, distance), __shfl_xor_sync(0xffffffffu, mine.sum, distance),
              __shfl_xor_sync(0xffffffffu, mine.index, distance)});
  return mine;
}

// Blocks: (kParts, K).
__global__ void __launch_bounds__(kThreads) find_parts(mythos_cuda_likeliest a, Best* parts) {
  __shared__ Best of_warp[kWarps];
  wait_for_previous();
  const int each = (a.vocab + kParts - 1) / kParts, first = blockIdx.x * each, last = min(first + each, a.vocab);
  const float* logits = a.logits + int64_t(blockIdx.y) * a.vocab;
  Best mine{-FLT_MAX, 0.0f, min(first, a.vocab - 1)};
  for (int i = first + threadIdx.x; i < last; i += kThreads) mine.add({logits[i], 1.0f, i});
  mine = best_of_warp(mine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll 1
  for (int warp = 1; warp < kWarps; ++warp) mine.add(of_warp[warp]);
  parts[blockIdx.y * kParts + blockIdx.x] = mine;
}

// A warp a row of logits.
__global__ void __launch_bounds__(32) find_best(mythos_cuda_likeliest a, const Best* parts) {
  wait_for_previous();
  Best mine = parts[blockIdx.x * kParts + threadIdx.x];
#pragma unroll 1
  for (int part = threadIdx.x + 32; part < kParts; part += 32) mine.add(parts[blockIdx.x * kParts + part]);
  mine = best_of_warp(mine);
  if (threadIdx.x == 0) a.tokens[blockIdx.x] = mine.index, a.logprobs[blockIdx.x] = -logf(mine.sum);
}

// A thread a sequence.
__global__ void advance(mythos_cuda_advance a) {
  wait_for_previous();
  const int sequence = blockIdx.x * blockDim.x + threadIdx.x;
  if (sequence >= a.batch) return;
  a.past_len[sequence] += a.counts[sequence];
  if (a.tokens != nullptr) a.input_ids[sequence] = a.tokens[sequence];
}

bool is_valid(const mythos_cuda_likeliest* a) {
  return a != nullptr && a->size >= sizeof(*a) && a->rows >= 0 && a->rows <= 65535 && a->vocab > 0;
}

}  // namespace
}  // namespace mythos::cuda

using namespace mythos::cuda;

extern "C" {

__attribute__((visibility("default"))) int32_t mythos_cuda_append_launch(const mythos_cuda_append* a, void* stream) {
  const bool sizes = a != nullptr && a->size >= sizeof(*a) && a->slots >= 0 && a->batch >= 0 && a->seq >= 0 && a->capacity > 0;
  if (!sizes || a->row_bytes <= 0 || a->slots > 65535 || a->batch > 65535) return cudaErrorInvalidValue;
  if (a->slots == 0 || a->batch == 0 || a->seq == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  const uint64_t whole = reinterpret_cast<uint64_t>(a->new_rows) | reinterpret_cast<uint64_t>(a->rows) | uint64_t(a->row_bytes);
  if (whole % sizeof(uint4) == 0) return launch_append<uint4>(*a, on);
  return whole % sizeof(uint32_t) == 0 ? launch_append<uint32_t>(*a, on) : launch_append<uint8_t>(*a, on);
}

__attribute__((visibility("default"))) uint64_t mythos_cuda_likeliest_workspace(const mythos_cuda_likeliest* a) {
  return is_valid(a) ? uint64_t(a->rows + 1) * kParts * sizeof(Best) : 0;
}

__attribute__((visibility("default"))) int32_t mythos_cuda_likeliest_launch(const mythos_cuda_likeliest* a, void* stream) {
  if (!is_valid(a) || a->workspace_bytes < mythos_cuda_likeliest_workspace(a)) return cudaErrorInvalidValue;
  if (a->rows == 0) return cudaSuccess;
  const auto parts = static_cast<Best*>(a->workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = launch_kernel(find_parts, dim3(kParts, a->rows), kThreads, 0, on, *a, parts);
  return error != cudaSuccess ? error : launch_kernel(find_best, a->rows, 32, 0, on, *a, parts);
}

__attribute__((visibility("default"))) int32_t mythos_cuda_advance_launch(const mythos_cuda_advance* a, void* stream) {
  if (a == nullptr || a->size < sizeof(*a) || a->batch < 0) return cudaErrorInvalidValue;
  if (a->batch == 0) return cudaSuccess;
  return launch_kernel(advance, (a->batch + 31) / 32, 32, 0, static_cast<cudaStream_t>(stream), *a);
}

}  // extern "C"
