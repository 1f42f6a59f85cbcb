// Which routed experts a token goes to, a warp a token (arXiv 2401.06066, 2408.15664, 2412.19437).
//
// Shape letters: T tokens, E routed experts, K top_k.
#include <cuda_runtime.h>

#include <cfloat>

#include "launch.cuh"
#include "mythos_cuda.h"
#include "numbers.cuh"

namespace mythos::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMostRanks = 32;          // a lane each: top_k and groups are at most so many
constexpr float kSmallestSum = 1e-20f;  // of sigmoids, which may all be 0

// Numbers of the same order as floats; no float gives 0.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The largest of a warp's keys, and its index; the lowest index among equals.
struct Best {
  uint32_t key;
  int index;

  __device__ __forceinline__ Best(uint32_t mine, int index_of_mine)
      : key(__reduce_max_sync(0xffffffffu, mine)), index(int(__reduce_min_sync(0xffffffffu, mine == key ? uint32_t(index_of_mine) : ~0u))) {}
};

// Of the lanes below count, where all others have 0; those below get it.
__device__ __forceinline__ float sum_of_first(float value, int count) {
#pragma unroll 1
  for (int distance = 1; distance < count; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// kEach: experts a lane; lane l has experts l, l + 32 and so on.
template <int kEach>
__global__ void __launch_bounds__(32 * kWarps) choose(mythos_cuda_routing a) {
  const int lane = threadIdx.x % 32, token = blockIdx.x * kWarps + threadIdx.x / 32;
  float scores[kEach];
  uint32_t keys[kEach];  // of what is left to choose from, 0 for what is not
#pragma unroll
  for (int i = 0; i < kEach; ++i) scores[i] = lane + 32 * i < a.experts ? a.bias[lane + 32 * i] : 0.0f;
  wait_for_previous();
  if (token >= a.tokens) return;
  const float* logits = a.logits + int64_t(token) * a.experts;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool there = lane + 32 * i < a.experts;
    const float logit = there ? logits[lane + 32 * i] : -FLT_MAX, bias = scores[i];
    scores[i] = a.sigmoid ? 1.0f / (1.0f + __expf(-logit)) : logit;
    keys[i] = there ? ordered(scores[i] + bias) : 0;
  }
  // The best expert in [first, first + count), which is then left no more.
  const auto take = [&](uint32_t (&from)[kEach], int first, int count) {
    uint32_t key = 0;
    int index = first;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (uint32_t(lane + 32 * i - first) < uint32_t(count) && from[i] > key) key = from[i], index = lane + 32 * i;
    const Best best(key, index);
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (lane + 32 * i == best.index) from[i] = 0;
    return best;
  };
  if (a.top_k_groups < a.groups) {
    const int each = a.experts / a.groups;
    uint32_t group_key = 0, kept = 0, spent[kEach];  // of group `lane`; a bit each
#pragma unroll
    for (int i = 0; i < kEach; ++i) spent[i] = keys[i];
#pragma unroll 1
    for (int group = 0; group < a.groups; ++group) {
      float sum = 0.0f;
#pragma unroll 1
      for (int i = 0; i < a.group_top_k; ++i) sum += unordered(take(spent, group * each, each).key);
      if (lane == group) group_key = ordered(sum);
    }
#pragma unroll 1
    for (int i = 0; i < a.top_k_groups; ++i) {
      const Best best(group_key, lane);
      kept |= 1u << best.index;
      if (lane == best.index) group_key = 0;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (!(kept >> (lane + 32 * i) / each & 1)) keys[i] = 0;
  }
  uint32_t chosen = 0;  // of rank `lane`
#pragma unroll 1
  for (int rank = 0; rank < a.top_k; ++rank) {
    const int expert = min(take(keys, 0, a.experts).index, a.experts - 1);
    if (lane == rank) chosen = expert;
  }
  float score = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {  // after the loop: in it, every rank would wait for its score
    const float found = __shfl_sync(0xffffffffu, scores[i], chosen % 32);
    if (chosen / 32 == i) score = found;
  }
  const bool ranked = lane < a.top_k;
  float weight = ranked ? score : 0.0f, sum = 1.0f;
  if (!a.sigmoid) {
    float most = ranked ? score : -FLT_MAX;
    if (!a.normalized)
#pragma unroll
      for (int i = 0; i < kEach; ++i) most = fmaxf(most, lane + 32 * i < a.experts ? scores[i] : -FLT_MAX);
    most = unordered(__reduce_max_sync(0xffffffffu, ordered(most)));
    weight = ranked ? __expf(score - most) : 0.0f;
    if (!a.normalized) {
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += lane + 32 * i < a.experts ? __expf(scores[i] - most) : 0.0f;
      sum = sum_of_warp(sum);
    }
  }
  if (a.normalized) sum = sum_of_first(weight, a.top_k) + kSmallestSum;
  if (!ranked) return;
  const int64_t at = int64_t(token) * a.top_k + lane;
  a.chosen[at] = chosen;
  a.weight[at] = __fdividef(weight, sum) * a.scale;
}

}  // namespace
}  // namespace mythos::cuda

using namespace mythos::cuda;

extern "C" __attribute__((visibility("default"))) int32_t mythos_cuda_routing_launch(const mythos_cuda_routing* a, void* stream) {
  const bool sizes = a != nullptr && a->size >= sizeof(*a) && a->tokens >= 0 && a->top_k > 0 && a->top_k <= a->experts;
  if (!sizes || a->groups <= 0 || a->experts % a->groups != 0 || a->top_k_groups <= 0 || a->top_k_groups > a->groups ||
      a->group_top_k <= 0 || a->group_top_k > a->experts / a->groups || a->top_k > kMostRanks || a->groups > kMostRanks || a->experts > 1024)
    return cudaErrorInvalidValue;
  if (a->tokens == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  const auto launch = [&](auto kernel) { return launch_kernel(kernel, (a->tokens + kWarps - 1) / kWarps, 32 * kWarps, 0, on, *a); };
  if (a->experts <= 64) return launch(choose<2>);
  return a->experts <= 256 ? launch(choose<8>) : launch(choose<32>);
}
