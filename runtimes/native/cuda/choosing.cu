// Drawing tokens from rows of logits: a block a row.
//
// Shape letters: K rows of logits, V vocab.
#include <cuda_runtime.h>

#include <cfloat>

#include "choosing.cuh"
#include "launch.cuh"
#include "mythos_cuda.h"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

// What threads tell each other, once a warp.
struct OfWarps {
  Run runs[kWarps];
  double values[kWarps];
  int ids[kWarps];
};

class BlockThreads {
 public:
  __device__ __forceinline__ explicit BlockThreads(OfWarps& of_warps) : of_warps_(of_warps) {}

  __device__ __forceinline__ int index() const { return threadIdx.x; }
  __device__ __forceinline__ int count() const { return kThreads; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void add(uint32_t* to, uint32_t n) const { atomicAdd(to, n); }
  __device__ __forceinline__ void add(uint64_t* to, uint64_t n) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
  }
  __device__ __forceinline__ void lowest(uint32_t* to, uint32_t n) const { atomicMin(to, n); }
  __device__ __forceinline__ bool any(bool mine) const { return __syncthreads_or(mine) != 0; }

  // Over the threads before this one.
  __device__ __forceinline__ Run sum_before(Run mine) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Run up_to_me = up_to(mine, lane);
    if (lane == 31) of_warps_.runs[warp] = up_to_me;
    __syncthreads();
    if (warp == 0) {
      const Run of_warp = of_warps_.runs[lane], up_to_it = up_to(of_warp, lane);
      of_warps_.runs[lane] = {up_to_it.n - of_warp.n, up_to_it.likelihood - of_warp.likelihood};
    }
    __syncthreads();
    const Run others = of_warps_.runs[warp];
    return {others.n + up_to_me.n - mine.n, others.likelihood + up_to_me.likelihood - mine.likelihood};
  }

  // Over all threads, for all.
  __device__ __forceinline__ Run sum(Run mine) const {
    const Run before = sum_before(mine);
    __syncthreads();
    if (threadIdx.x == kThreads - 1) of_warps_.runs[0] = {before.n + mine.n, before.likelihood + mine.likelihood};
    __syncthreads();
    const Run all = of_warps_.runs[0];
    __syncthreads();
    return all;
  }

  __device__ __forceinline__ void largest(double& value, int& id) const {
    const int lane = threadIdx.x % 32;
    largest_of_warp(value, id);
    if (lane == 0) of_warps_.values[threadIdx.x / 32] = value, of_warps_.ids[threadIdx.x / 32] = id;
    __syncthreads();
    value = of_warps_.values[lane], id = of_warps_.ids[lane];
    largest_of_warp(value, id);
    __syncthreads();
  }

 private:
  static __device__ __forceinline__ Run up_to(Run run, int lane) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t n = __shfl_up_sync(kAll, run.n, distance);
      const uint64_t likelihood = __shfl_up_sync(kAll, static_cast<unsigned long long>(run.likelihood), distance);
      if (lane >= distance) run.n += n, run.likelihood += likelihood;
    }
    return run;
  }

  static __device__ __forceinline__ void largest_of_warp(double& value, int& id) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(kAll, value, distance);
      const int other_id = __shfl_xor_sync(kAll, id, distance);
      if (other > value || (other == value && other_id < id)) value = other, id = other_id;
    }
  }

  OfWarps& of_warps_;
};

// Blocks: K.
__global__ void __launch_bounds__(kThreads) choose_token(mythos_cuda_choose a) {
  __shared__ ChoosingMemory memory;
  __shared__ OfWarps of_warps;
  wait_for_previous();
  const BlockThreads threads(of_warps);
  const int64_t row = blockIdx.x;
  const float* logits = a.logits + row * a.vocab;
  const uint32_t* seen = a.seen == nullptr ? nullptr : a.seen + row * ((a.vocab + 31) / 32);
  uint64_t random = a.random[row];
  const Choosing c = {a.vocab, a.top_k, a.temperature, a.top_p, a.min_p, a.repetition_penalty};
  const int token = choose(c, logits, seen, random, static_cast<uint64_t*>(a.workspace) + row * a.vocab, threads, memory);

  float most = -FLT_MAX, sum = 0;  // of the model's own logits
  for (int id = threadIdx.x; id < a.vocab; id += kThreads) most = fmaxf(most, logits[id]);
  double top = most;
  int unused = 0;
  threads.largest(top, unused);
  for (int id = threadIdx.x; id < a.vocab; id += kThreads) sum += expf(logits[id] - float(top));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  if (threadIdx.x % 32 == 0) of_warps.values[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double all = 0;
#pragma unroll 1
  for (int warp = 0; warp < kWarps; ++warp) all += of_warps.values[warp];
  a.random[row] = random;
  a.tokens[row] = token;
  a.logprobs[row] = float(double(logits[max(token, 0)]) - top - log(all));
}

bool is_valid(const mythos_cuda_choose* a) {
  return a != nullptr && a->size >= sizeof(mythos_cuda_choose) && a->rows >= 0 && a->vocab > 0 && a->vocab <= kMostVocab &&
         a->top_k >= 0 && a->temperature >= 0 && a->top_p > 0 && a->top_p <= 1 && a->min_p >= 0 && a->min_p <= 1 &&
         a->repetition_penalty > 0;
}

}  // namespace
}  // namespace mythos::cuda

using namespace mythos::cuda;

extern "C" {

__attribute__((visibility("default"))) uint64_t mythos_cuda_choose_workspace(const mythos_cuda_choose* a) {
  return is_valid(a) ? uint64_t(a->rows + 1) * a->vocab * sizeof(uint64_t) : 0;
}

__attribute__((visibility("default"))) int32_t mythos_cuda_choose_launch(const mythos_cuda_choose* a, void* stream) {
  if (!is_valid(a) || a->workspace_bytes < mythos_cuda_choose_workspace(a)) return cudaErrorInvalidValue;
  if (a->rows == 0) return cudaSuccess;
  return launch_kernel(choose_token, a->rows, kThreads, 0, static_cast<cudaStream_t>(stream), *a);
}

}  // extern "C"
