// Attention in float32 for any sizes, a head a block, a row a warp at a time.
#include "attention.cuh"
#include "launch.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kMostChannels = 16;  // of the values that a lane sums: Y is at most 512

// Blocks: (P, T, H).
template <typename C>
__global__ void __launch_bounds__(kThreads)
    attend_one(Shape n, const float* queries, AllRows<C> cache, const int64_t* past_len, Partial out) {
  extern __shared__ __align__(16) unsigned char memory[];
  float* query = reinterpret_cast<float*>(memory);  // [X]
  float* sums = query + n.key_dim;                  // [kWarps, Y]
  __shared__ float states[kWarps][2];
  wait_for_previous();
  const int head = blockIdx.z, group = head / n.heads, token = blockIdx.y, part = blockIdx.x, s = token % n.seq;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Rows<C> rows(n, cache.past, cache.fresh, past_len[token / n.seq], token / n.seq);
  const Scales<C> scales(n, cache, past_len[token / n.seq], token / n.seq);
  const Range range(n, rows, s, s, part, 1);
  for (int i = threadIdx.x; i < n.key_dim; i += kThreads)
    query[i] = queries[n.query_of(token, head) * n.key_dim + i] * n.scale * kLog2E;
  __syncthreads();
  float sum[kMostChannels] = {}, largest = -FLT_MAX, total = 0.0f;
  for (int row = range.from + warp; row < range.to; row += kWarps) {
    const C *keys = rows[row] + n.keys_at + group * n.step, *values = rows[row] + n.values_at + group * n.step;
    const float scale = scales[row];
    float score = 0.0f;
    for (int i = lane; i < n.key_dim; i += 32) score = fmaf(to_float(keys[i]), query[i], score);
    score = sum_of_warp(score) * scale;
    const float next = fmaxf(largest, score), factor = exp2f(largest - next), weight = exp2f(score - next);
#pragma unroll
    for (int i = 0; i < kMostChannels; ++i)
      if (lane + 32 * i < n.value_dim) sum[i] = fmaf(sum[i], factor, weight * scale * to_float(values[lane + 32 * i]));
    total = total * factor + weight;
    largest = next;
  }
#pragma unroll
  for (int i = 0; i < kMostChannels; ++i)
    if (lane + 32 * i < n.value_dim) sums[warp * n.value_dim + lane + 32 * i] = sum[i];
  if (lane == 0) states[warp][0] = largest, states[warp][1] = total;
  __syncthreads();
  float most = -FLT_MAX, all = 0.0f, factors[kWarps];
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, states[w][0]);
  for (int w = 0; w < kWarps; ++w) all += states[w][1] * (factors[w] = exp2f(states[w][0] - most));
  const int64_t at = n.query_of(token, head) * n.parts + part;
  for (int i = threadIdx.x; i < n.value_dim; i += kThreads) {
    float value = 0.0f;
    for (int w = 0; w < kWarps; ++w) value = fmaf(sums[w * n.value_dim + i], factors[w], value);
    out.sums[at * n.value_dim + i] = value;
  }
  if (threadIdx.x == 0) out.states[2 * at] = most, out.states[2 * at + 1] = all;
}

}  // namespace

template <typename C>
cudaError_t attend_plainly(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, cudaStream_t stream) {
  const size_t bytes = (n.key_dim + kWarps * n.value_dim) * sizeof(float);
  const dim3 blocks(n.parts, a.batch * a.seq, n.n_heads);
  return launch_kernel(attend_one<C>, blocks, kThreads, bytes, stream, n, static_cast<const float*>(w.queries), AllRows<C>(a),
                       a.past_len, w.parts);
}

template cudaError_t attend_plainly<float>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t attend_plainly<__half>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t attend_plainly<__nv_bfloat16>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t attend_plainly<int8_t>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);

}  // namespace mythos::cuda
