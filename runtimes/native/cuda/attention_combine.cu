// After attention: parts put together, and latent attention's sums through w_uv.
#include "attention_flash.cuh"
#include "attention_heads.cuh"
#include "launch.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kChannels = 8;  // of a lane at a time
constexpr int kRows = 8;      // of w_uv that a warp computes at the same time
static_assert(kThreads >= kMostParts, "a thread a part");

// values [Y] of a token and head, in shared memory; partial: [kWarps, Y]. Warps share the parts out among themselves, and read several
// at the same time.
__device__ __forceinline__ void combine_parts(const Shape& n, const Partial& parts, int token, int head, float* partial, float* values) {
  __shared__ float factors[kMostParts], scratch[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = n.query_of(token, head) * n.parts;
  const bool mine = threadIdx.x < n.parts;
  // A warp's first part is read while its factor is made.
  float early[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    early[i] = warp < n.parts && lane + i * 32 < n.value_dim ? parts.sums[(at + warp) * n.value_dim + lane + i * 32] : 0.0f;
  const float2 state = mine ? reinterpret_cast<const float2*>(parts.states)[at + threadIdx.x] : float2{-FLT_MAX, 0.0f};
  const float most = most_of_block<kWarps>(state.x, scratch), factor_of_part = power_of_two(state.x - most);
  if (mine) factors[threadIdx.x] = factor_of_part;
  const float total = sum_of_block<kWarps>(state.y * factor_of_part, scratch);
#pragma unroll 1
  for (int channel = lane; channel < n.value_dim; channel += 32 * kChannels) {
    float sum[kChannels] = {};
    int part = warp;
    if (channel == lane && warp < n.parts) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] = early[i] * factors[warp];
      part += kWarps;
    }
#pragma unroll 4
    for (; part < n.parts; part += kWarps) {
      const float factor = factors[part];
      const float* row = parts.sums + (at + part) * n.value_dim + channel;
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        if (channel + i * 32 < n.value_dim) sum[i] = fmaf(row[i * 32], factor, sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (channel + i * 32 < n.value_dim) partial[warp * n.value_dim + channel + i * 32] = sum[i];
  }
  __syncthreads();
#pragma unroll 1
  for (int channel = threadIdx.x; channel < n.value_dim; channel += kThreads) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += partial[w * n.value_dim + channel];
    values[channel] = __fdividef(value, total);
  }
  __syncthreads();
}

// The same of one part: y [T, H, Y]. A block a token.
template <typename Out>
__global__ void __launch_bounds__(kThreads) normalize(Shape n, Partial parts, Out* y) {
  wait_for_previous();
  const int token = blockIdx.x;
#pragma unroll 4
  for (Place at(threadIdx.x, n.value_dim); at.row < n.n_heads; at.move(kThreads, n.value_dim)) {
    const int64_t query = n.query_of(token, at.row);
    const float value = __fdividef(parts.sums[query * n.value_dim + at.piece], parts.states[2 * query + 1]);
    y[(int64_t(token) * n.n_heads + at.row) * n.value_dim + at.piece] = from_float<Out>(value);
  }
}

// y [T, H, Y]. Blocks: (H, T).
template <typename Out>
__global__ void __launch_bounds__(kThreads) combine(Shape n, Partial parts, Out* y) {
  extern __shared__ float memory[];
  wait_for_previous();
  const int token = blockIdx.y, head = blockIdx.x;
  float* values = memory + kWarps * n.value_dim;
  combine_parts(n, parts, token, head, memory, values);
#pragma unroll 1
  for (int i = threadIdx.x; i < n.value_dim; i += kThreads) y[(int64_t(token) * n.n_heads + head) * n.value_dim + i] = from_float<Out>(values[i]);
}

// The same through w_uv [H, V, Y]: y [T, H, V]. Blocks: (H, T).
template <typename W, int kPiece>
__global__ void __launch_bounds__(kThreads) combine_latent(Shape n, Partial parts, const W* w_uv, int v_head_dim, float* y) {
  extern __shared__ float memory[];
  const int token = blockIdx.y, head = blockIdx.x, lane = threadIdx.x % 32;
  const W* matrix = w_uv + int64_t(head) * v_head_dim * n.value_dim;
  prefetch(matrix, int64_t(v_head_dim) * n.value_dim * sizeof(W));
  // What a warp reads first is there before the wait.
  Piece<W, kPiece> pieces[kRows];
  const auto load = [&](int v0, int i) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) pieces[row].load_kept(matrix + min(v0 + row, v_head_dim - 1) * n.value_dim + i);
  };
  const int first_v = threadIdx.x / 32 * kRows;
  bool held = first_v < v_head_dim && lane * kPiece < n.value_dim;
  if (held) load(first_v, lane * kPiece);
  wait_for_previous();
  float* values = memory + kWarps * n.value_dim;
  combine_parts(n, parts, token, head, memory, values);
  // Neighbours of a warp's rows belong to it too.
#pragma unroll 1
  for (int v0 = first_v; v0 < v_head_dim; v0 += kWarps * kRows) {
    float sum[kRows] = {};
#pragma unroll 1
    for (int i = lane * kPiece; i < n.value_dim; i += 32 * kPiece) {
      float x[kPiece], w[kPiece];
      if (!held) load(v0, i);
      held = false;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) x[j] = values[i + j];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        pieces[row].unpack(w);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) sum[row] = fmaf(w[j], x[j], sum[row]);
      }
    }
    const float total = sums_of_warp(sum);
    const int v = v0 + lane / 4;
    if (lane % 4 == 0 && v < v_head_dim) y[(int64_t(token) * n.n_heads + head) * v_head_dim + v] = total;
  }
}

template <typename Out>
cudaError_t combine_all(const mythos_cuda_attention& a, const Shape& n, const Partial& parts, Out* y, cudaStream_t stream) {
  const int tokens = a.batch * a.seq;
  if (n.parts == 1 && tokens > 1) return launch_kernel(normalize<Out>, tokens, kThreads, 0, stream, n, parts, y);
  return launch_kernel(combine<Out>, dim3(a.n_heads, tokens), kThreads, (kWarps + 1) * n.value_dim * sizeof(float), stream, n, parts, y);
}

}  // namespace

template <typename W>
cudaError_t put_together(const mythos_cuda_attention& a, const Shape& n, const Ways& ways, const AttentionWorkspace& w, cudaStream_t stream) {
  const dim3 blocks(a.n_heads, a.batch * a.seq);
  const size_t bytes = (kWarps + 1) * n.value_dim * sizeof(float);
  if (a.n_kv_heads > 0) return combine_all(a, n, w.parts, a.y, stream);
  const auto w_uv = static_cast<const W*>(a.w_uv);
  if constexpr (!std::is_same_v<W, float>)
    if (ways.many_tokens) {
      const auto rounded = static_cast<W*>(w.rounded);
      const cudaError_t error = combine_all(a, n, w.parts, rounded, stream);
      if (error != cudaSuccess) return error;
      return multiply_heads<W, float>({a.batch * a.seq, a.n_heads, n.value_dim, a.v_head_dim, a.v_head_dim}, rounded, w_uv, a.y, stream);
    }
  return with_piece(n.value_dim, [&](auto piece) {
    return launch_kernel(combine_latent<W, piece()>, blocks, kThreads, bytes, stream, n, w.parts, w_uv, a.v_head_dim, a.y);
  });
}

template cudaError_t put_together<float>(const mythos_cuda_attention&, const Shape&, const Ways&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t put_together<__half>(const mythos_cuda_attention&, const Shape&, const Ways&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t put_together<__nv_bfloat16>(const mythos_cuda_attention&, const Shape&, const Ways&, const AttentionWorkspace&, cudaStream_t);

}  // namespace mythos::cuda
