// What the two ways of running experts share: the sizes, and where things lie in the workspace.
#pragma once

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mythos_cuda.h"
#include "quantized.cuh"

namespace mythos::cuda {

// One way for few tokens, a row of a matrix a warp; one for many, tiles on tensor cores. Which it is depends on the sizes alone.
bool is_few(const mythos_cuda_experts& experts);

uint64_t few_workspace(const mythos_cuda_experts& experts);
uint64_t few_quantized_workspace(const mythos_cuda_experts& experts);
uint64_t many_workspace(const mythos_cuda_experts& experts);

template <typename W>
cudaError_t launch_few(const mythos_cuda_experts& experts, cudaStream_t stream);
cudaError_t launch_few_quantized(const mythos_cuda_experts& experts, cudaStream_t stream);
// Stored: a float type, or how quantized weights are stored.
template <typename Stored>
cudaError_t launch_many(const mythos_cuda_experts& experts, cudaStream_t stream);

// A block of memory given out from the start, in aligned pieces.
class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}

  template <typename T>
  T* take(uint64_t count) {
    char* piece = start_ + used_;
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(piece);
  }

  uint64_t used() const { return used_; }

 private:
  char* start_;
  uint64_t used_ = 0;
};

inline uint64_t pairs(const mythos_cuda_experts& e) { return uint64_t(e.tokens) * e.top_k; }
// Rows of what the experts' first products give: of every chosen pair, then of every shared expert's tokens.
inline uint64_t inner_rows(const mythos_cuda_experts& e) { return pairs(e) + uint64_t(e.tokens) * e.shared; }

// What kernels are told of a call.
struct Sizes {
  int tokens, dim, expert_dim, top_k, routed, shared;
};
inline Sizes sizes_of(const mythos_cuda_experts& e) { return {e.tokens, e.dim, e.expert_dim, e.top_k, e.routed, e.shared}; }

// A choice that is none of the experts must not lead outside their stack.
__device__ __forceinline__ int clamp_expert(int expert, const Sizes& n) { return min(max(expert, 0), n.routed - 1); }

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace mythos::cuda
