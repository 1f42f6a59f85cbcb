// After attention: parts put together, and latent attention's sums through w_uv.
#include "attention_flash.cuh"
#include "attention_heads.cuh"
#include "clusters.cuh"
#include "launch.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 512, kThreadsOfShare = 256;
constexpr int kShares = 8;  // blocks that put a head together, where they have something to share
constexpr int kFewHeads = 64, kManyNumbers = 1 << 15;  // of all tokens; of a head's w_uv
constexpr int kFewChannels = 256;  // that half as many blocks put together: not all clusters of more find room beside attention's blocks
static_assert(kThreadsOfShare >= kMostParts, "a thread a part");

// partial [kWarps, count]: each warp's share of the sum over all parts of a token's and head's channels [first, first + count), all of them
// to be divided by what is returned. kChannels: of a lane at a time. kHeld: parts of a warp that are read while their factors are made.
template <int kWarps, int kChannels, int kHeld>
__device__ __forceinline__ float add_parts(const Shape& n, const Partial& parts, int token, int head, int first, int count, float* partial) {
  __shared__ float factors[kMostParts], scratch[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = n.query_of(token, head) * n.parts;
  const bool mine = threadIdx.x < n.parts;
  const float* const sums = parts.sums + first;
  float held[kHeld][kChannels];
#pragma unroll
  for (int i = 0; i < kHeld * kChannels; ++i) {
    const int part = warp + i / kChannels * kWarps, channel = lane + i % kChannels * 32;
    held[i / kChannels][i % kChannels] = part < n.parts && channel < count ? sums[(at + part) * n.value_dim + channel] : 0.0f;
  }
  const float2 state = mine ? reinterpret_cast<const float2*>(parts.states)[at + threadIdx.x] : float2{-FLT_MAX, 0.0f};
  const float most = most_of_block<kWarps>(state.x, scratch), factor_of_part = power_of_two(state.x - most);
  if (mine) factors[threadIdx.x] = factor_of_part;
  const float total = sum_of_block<kWarps>(state.y * factor_of_part, scratch);
#pragma unroll 1
  for (int channel = lane; channel < count; channel += 32 * kChannels) {
    float sum[kChannels] = {};
    int part = warp;
    if (channel == lane)
#pragma unroll
      for (int own = 0; own < kHeld; ++own, part += kWarps)
        if (part < n.parts)
#pragma unroll
          for (int i = 0; i < kChannels; ++i) sum[i] = fmaf(held[own][i], factors[part], sum[i]);
#pragma unroll 4
    for (; part < n.parts; part += kWarps) {
      const float factor = factors[part];
      const float* row = sums + (at + part) * n.value_dim + channel;
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        if (channel + i * 32 < count) sum[i] = fmaf(row[i * 32], factor, sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (channel + i * 32 < count) partial[warp * count + channel + i * 32] = sum[i];
  }
  __syncthreads();
  return total;
}

// A channel of them, of `count`.
template <int kWarps>
__device__ __forceinline__ float value_of(const float* partial, int count, int channel, float total) {
  float value = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value += partial[w * count + channel];
  return __fdividef(value, total);
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
  constexpr int kWarps = kThreads / 32;
  extern __shared__ float partial[];
  wait_for_previous();
  const int token = blockIdx.y, head = blockIdx.x;
  const float total = add_parts<kWarps, 8, 1>(n, parts, token, head, 0, n.value_dim, partial);
#pragma unroll 1
  for (int i = threadIdx.x; i < n.value_dim; i += kThreads)
    y[(int64_t(token) * n.n_heads + head) * n.value_dim + i] = from_float<Out>(value_of<kWarps>(partial, n.value_dim, i, total));
}

// The same through w_uv [H, V, Y]: y [T, H, V]. Blocks: (shares, H, T), of clusters of `shares` blocks, which put channels together for one
// another, and share out w_uv's rows. kShared: whether there are several. Few registers: the next call's attention starts beside it.
template <typename W, int kPiece, bool kShared, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) combine_latent(Shape n, Partial parts, const W* w_uv, int v_head_dim, float* y) {
  constexpr int kWarps = kThreads / 32, kRows = kShared ? 2 : 4;  // rows: of w_uv that a warp computes at the same time
  extern __shared__ float memory[];
  __shared__ uint64_t barrier;
  const int token = blockIdx.z, head = blockIdx.y, rank = blockIdx.x, shares = gridDim.x, lane = threadIdx.x % 32;
  const int each = ceil_div(n.value_dim, shares), first = min(rank * each, n.value_dim), count = min(each, n.value_dim - first);
  const int each_v = ceil_div(v_head_dim, shares), end_v = min((rank + 1) * each_v, v_head_dim);
  const W* matrix = w_uv + int64_t(head) * v_head_dim * n.value_dim;
  const Delivery channels(shared_address(&barrier));
  if (kShared && threadIdx.x == 0) channels.expect(n.value_dim * sizeof(float));
  if (kShared) arrive_in_cluster();
  if (rank * each_v < end_v) prefetch(matrix + int64_t(rank) * each_v * n.value_dim, int64_t(end_v - rank * each_v) * n.value_dim * sizeof(W));
  // What a warp reads first is there before the wait.
  Piece<W, kPiece> pieces[kRows];
  const auto load = [&](int v0, int i) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) pieces[row].load_kept(matrix + min(v0 + row, v_head_dim - 1) * n.value_dim + i);
  };
  const int first_v = rank * each_v + threadIdx.x / 32 * kRows;
  bool held = first_v < end_v && lane * kPiece < n.value_dim;
  if (held) load(first_v, lane * kPiece);
  if (kShared) wait_for_cluster();
  wait_for_previous();
  float *values = memory, *partial = memory + n.value_dim;
  const float total = add_parts<kWarps, kShared ? 2 : 8, kShared ? (kMostParts + kWarps - 1) / kWarps : 1>(n, parts, token, head, first, count, partial);
#pragma unroll 1
  for (Place at(threadIdx.x, max(count, 1)); at.row < shares && count > 0; at.move(kThreads, count)) {
    const float value = value_of<kWarps>(partial, count, at.piece, total);
    if constexpr (kShared) channels.send(shared_address(values + first + at.piece), at.row, __float_as_uint(value));
    else values[at.piece] = value;
  }
  if constexpr (kShared) channels.wait();
  else __syncthreads();
  // Neighbours of a warp's rows belong to it too.
#pragma unroll 1
  for (int v0 = first_v; v0 < end_v; v0 += kWarps * kRows) {
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
    constexpr int kLanes = 32 / kRows;
    const float of_row = sums_of_warp(sum);
    const int v = v0 + lane / kLanes;
    if (lane % kLanes == 0 && v < end_v) y[(int64_t(token) * n.n_heads + head) * v_head_dim + v] = of_row;
  }
}

template <typename Out>
cudaError_t combine_all(const mythos_cuda_attention& a, const Shape& n, const Partial& parts, Out* y, cudaStream_t stream) {
  const int tokens = a.batch * a.seq;
  if (n.parts == 1 && tokens > 1) return launch_kernel(normalize<Out>, tokens, kThreads, 0, stream, n, parts, y);
  return launch_kernel(combine<Out>, dim3(a.n_heads, tokens), kThreads, kThreads / 32 * n.value_dim * sizeof(float), stream, n, parts, y);
}

}  // namespace

template <typename W>
cudaError_t put_together(const mythos_cuda_attention& a, const Shape& n, const Ways& ways, const AttentionWorkspace& w, cudaStream_t stream) {
  if (a.n_kv_heads > 0) return combine_all(a, n, w.parts, a.y, stream);
  const auto w_uv = static_cast<const W*>(a.w_uv);
  if constexpr (!std::is_same_v<W, float>)
    if (ways.many_tokens) {
      const auto rounded = static_cast<W*>(w.rounded);
      const cudaError_t error = combine_all(a, n, w.parts, rounded, stream);
      if (error != cudaSuccess) return error;
      return multiply_heads<W, float>({a.batch * a.seq, a.n_heads, n.value_dim, a.v_head_dim, a.v_head_dim}, rounded, w_uv, a.y, stream);
    }
  const bool shared = n.has_many_parts() || a.v_head_dim * n.value_dim >= kManyNumbers;
  const int heads = a.batch * a.seq * a.n_heads, most_shares = n.has_many_parts() && n.value_dim <= kFewChannels ? kShares / 2 : kShares;
  const int shares = shared && heads <= kFewHeads && has_clusters() ? most_shares : 1;
  const dim3 blocks(shares, a.n_heads, a.batch * a.seq);
  const int threads = shares > 1 ? kThreadsOfShare : kThreads;
  const size_t bytes = (n.value_dim + threads / 32 * ceil_div(n.value_dim, shares)) * sizeof(float);
  return with_piece(n.value_dim, [&](auto piece) {
    const auto launch = [&](auto kernel) {
      return launch_kernel({shares, n.has_many_parts()}, kernel, blocks, threads, bytes, stream, n, w.parts, w_uv, a.v_head_dim, a.y);
    };
    return shares > 1 ? launch(combine_latent<W, piece(), true, kThreadsOfShare>) : launch(combine_latent<W, piece(), false, kThreads>);
  });
}

template cudaError_t put_together<float>(const mythos_cuda_attention&, const Shape&, const Ways&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t put_together<__half>(const mythos_cuda_attention&, const Shape&, const Ways&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t put_together<__nv_bfloat16>(const mythos_cuda_attention&, const Shape&, const Ways&, const AttentionWorkspace&, cudaStream_t);

}  // namespace mythos::cuda
