// What brings rows together: those of tables for token ids and for positions, of a step's tokens, and its cache rows of all slots.
//
// Shape letters: B batch, S new tokens of a sequence, T tokens, N rows and D numbers a row of the table, b blocks of a row.
#include <cuda_fp8.h>

#include <algorithm>

#include "launch.cuh"
#include "mythos_cuda.h"
#include "numbers.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 256;

template <typename W>
__device__ __forceinline__ float number(const W* row, int i) {
  return to_float(row[i]);
}

struct Int4;  // two a byte
template <>
__device__ __forceinline__ float number(const Int4* row, int i) {
  const int pair = reinterpret_cast<const uint8_t*>(row)[i / 2];
  return float((((i % 2 == 0 ? pair : pair >> 4) & 15) ^ 8) - 8);
}

template <typename W>
__device__ __forceinline__ const W* row_of(const void* table, int64_t row, int dim) {
  if constexpr (std::is_same_v<W, Int4>) return reinterpret_cast<const W*>(static_cast<const uint8_t*>(table) + row * dim / 2);
  else return static_cast<const W*>(table) + row * dim;
}

// A block a token.
template <typename W, typename S>
__global__ void __launch_bounds__(kThreads) embed(mythos_cuda_embedding a) {
  wait_for_previous();
  const int64_t id = min(max(a.ids[blockIdx.x], int64_t(0)), int64_t(a.rows) - 1);
  const W* row = row_of<W>(a.table, id, a.dim);
  float* y = a.y + int64_t(blockIdx.x) * a.dim;
  if constexpr (std::is_same_v<S, void>) {
    for (int i = threadIdx.x; i < a.dim; i += kThreads) y[i] = number(row, i);
  } else {
    const S* scales = static_cast<const S*>(a.scales) + id * ((a.dim + a.block - 1) / a.block);
    for (int i = threadIdx.x; i < a.dim; i += kThreads) y[i] = number(row, i) * to_float(scales[i / a.block]);
  }
}

template <typename W>
cudaError_t launch_scaled(const mythos_cuda_embedding& a, cudaStream_t stream) {
  return launch_kernel(a.scale_dtype == MYTHOS_CUDA_FLOAT16 ? embed<W, __half> : embed<W, float>, a.tokens, kThreads, 0, stream, a);
}

cudaError_t launch(const mythos_cuda_embedding& a, cudaStream_t stream) {
  switch (a.dtype) {
    case MYTHOS_CUDA_FLOAT16: return launch_kernel(embed<__half, void>, a.tokens, kThreads, 0, stream, a);
    case MYTHOS_CUDA_BFLOAT16: return launch_kernel(embed<__nv_bfloat16, void>, a.tokens, kThreads, 0, stream, a);
    case MYTHOS_CUDA_INT8: return launch_scaled<int8_t>(a, stream);
    case MYTHOS_CUDA_INT4: return launch_scaled<Int4>(a, stream);
    case MYTHOS_CUDA_FLOAT8: return launch_scaled<__nv_fp8_e4m3>(a, stream);
    default: return launch_kernel(embed<float, void>, a.tokens, kThreads, 0, stream, a);
  }
}

bool is_valid(const mythos_cuda_embedding* a) {
  if (a == nullptr || a->size < sizeof(*a) || a->dtype < MYTHOS_CUDA_FLOAT32 || a->dtype > MYTHOS_CUDA_FLOAT8) return false;
  const bool quantized = a->dtype >= MYTHOS_CUDA_INT8;
  return a->tokens >= 0 && a->rows > 0 && a->dim > 0 && (!quantized || (a->block > 0 && a->scales != nullptr)) &&
         (a->dtype != MYTHOS_CUDA_INT4 || a->dim % 2 == 0);
}

// Blocks: (S, B).
__global__ void __launch_bounds__(32) position_rows(mythos_cuda_position_rows a) {
  wait_for_previous();
  const int64_t row = min(max(a.past_len[blockIdx.y] + int64_t(blockIdx.x), int64_t(0)), int64_t(a.rows) - 1);
  const int64_t token = int64_t(blockIdx.y) * a.seq + blockIdx.x;
  for (int i = threadIdx.x; i < a.dim; i += 32) a.y[token * a.dim + i] = a.table[row * a.dim + i];
}

// Blocks: (K, B).
__global__ void __launch_bounds__(kThreads) pick_rows(mythos_cuda_pick_rows a) {
  wait_for_previous();
  const int64_t to = int64_t(blockIdx.y) * a.count + blockIdx.x;
  const int64_t from = int64_t(blockIdx.y) * a.seq + min(max(a.positions[to], int64_t(0)), int64_t(a.seq) - 1);
#pragma unroll 4
  for (int i = threadIdx.x; i < a.dim; i += kThreads) a.y[to * a.dim + i] = a.x[from * a.dim + i];
}

constexpr int kParts = 256;  // of a launch: their addresses are among its parameters

struct Parts {
  const void* from[kParts];
};

// Blocks: (pieces of a part, parts).
template <typename Unit>
__global__ void __launch_bounds__(kThreads) stack(Parts parts, uint64_t units, Unit* y) {
  wait_for_previous();
  const Unit* from = static_cast<const Unit*>(parts.from[blockIdx.y]);
  for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < units; i += uint64_t(gridDim.x) * kThreads)
    y[blockIdx.y * units + i] = from[i];
}

template <typename Unit>
cudaError_t launch(const mythos_cuda_stack& a, cudaStream_t stream) {
  constexpr uint64_t kMostBlocks = 64;
  const uint64_t units = a.bytes / sizeof(Unit);
  for (int first = 0; first < a.count; first += kParts) {
    const int count = std::min(kParts, a.count - first);
    Parts parts = {};
    std::copy_n(a.parts + first, count, parts.from);
    const dim3 blocks(unsigned(std::min((units + kThreads - 1) / kThreads, kMostBlocks)), count);
    const cudaError_t error = launch_kernel(stack<Unit>, blocks, kThreads, 0, stream, parts, units, static_cast<Unit*>(a.y) + first * units);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool is_aligned(const mythos_cuda_stack& a, uint64_t to) {
  uint64_t bits = a.bytes | reinterpret_cast<uintptr_t>(a.y);
  for (int i = 0; i < a.count; ++i) bits |= reinterpret_cast<uintptr_t>(a.parts[i]);
  return bits % to == 0;
}

}  // namespace
}  // namespace mythos::cuda

using namespace mythos::cuda;

extern "C" {

__attribute__((visibility("default"))) int32_t mythos_cuda_embedding_launch(const mythos_cuda_embedding* a, void* stream) {
  if (!is_valid(a)) return cudaErrorInvalidValue;
  return a->tokens == 0 ? cudaSuccess : launch(*a, static_cast<cudaStream_t>(stream));
}

__attribute__((visibility("default"))) int32_t mythos_cuda_position_rows_launch(const mythos_cuda_position_rows* a, void* stream) {
  const bool sizes = a != nullptr && a->size >= sizeof(*a) && a->batch >= 0 && a->batch <= 65535 && a->seq >= 0;
  if (!sizes || a->rows <= 0 || a->dim <= 0) return cudaErrorInvalidValue;
  if (a->batch == 0 || a->seq == 0) return cudaSuccess;
  return launch_kernel(position_rows, dim3(a->seq, a->batch), 32, 0, static_cast<cudaStream_t>(stream), *a);
}

__attribute__((visibility("default"))) int32_t mythos_cuda_pick_rows_launch(const mythos_cuda_pick_rows* a, void* stream) {
  const bool sizes = a != nullptr && a->size >= sizeof(*a) && a->batch >= 0 && a->batch <= 65535 && a->count >= 0;
  if (!sizes || a->seq <= 0 || a->dim <= 0) return cudaErrorInvalidValue;
  if (a->batch == 0 || a->count == 0) return cudaSuccess;
  return launch_kernel(pick_rows, dim3(a->count, a->batch), kThreads, 0, static_cast<cudaStream_t>(stream), *a);
}

__attribute__((visibility("default"))) int32_t mythos_cuda_stack_launch(const mythos_cuda_stack* a, void* stream) {
  if (a == nullptr || a->size < sizeof(*a) || a->count < 0) return cudaErrorInvalidValue;
  if (a->count == 0 || a->bytes == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  return is_aligned(*a, sizeof(uint4)) ? launch<uint4>(*a, on) : launch<uint8_t>(*a, on);
}

}  // extern "C"
