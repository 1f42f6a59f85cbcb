// Before attention: queries as they are compared with rows, and the new rows. More letters: N qk_nope_head_dim, R kv_lora_rank.
#include "attention.cuh"
#include "attention_heads.cuh"
#include "launch.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kLanes = 8;  // that a row of w_uk is read by
constexpr int kBlockRows = 64;  // of w_uk

// A latent row: normalized, and turned by its position.
template <typename C>
__device__ __forceinline__ void make_row(const mythos_cuda_attention& a, int token, float* scratch) {
  const int half = a.rope / 2, width = a.rank + a.rope;
  const float *kv = a.kv + int64_t(token) * width, *cosines = a.cos + int64_t(token) * half, *sines = a.sin + int64_t(token) * half;
  C* row = static_cast<C*>(a.new_kv) + int64_t(token) * width;
  constexpr int kPieces = 512 / kThreads;  // R is at most 512
  float values[kPieces], squares = 0.0f;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int i = threadIdx.x + piece * kThreads;
    values[piece] = i < a.rank ? kv[i] : 0.0f;
    squares = fmaf(values[piece], values[piece], squares);
  }
  const float factor = inverse_rms(sum_of_block<kWarps>(squares, scratch), a.rank, a.epsilon);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int i = threadIdx.x + piece * kThreads;
    if (i < a.rank) row[i] = from_float<C>(values[piece] * factor * a.kv_norm[i]);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const float2 pair = rotated(kv[a.rank + i], kv[a.rank + half + i], cosines[i], sines[i]);
    row[a.rank + i] = from_float<C>(pair.x), row[a.rank + half + i] = from_float<C>(pair.y);
  }
}

// The part of a head's query that its position turns.
template <typename Query>
__device__ __forceinline__ void turn_query(const mythos_cuda_attention& a, int token, int head, Query* queries) {
  const int half = a.rope / 2, row = token * a.n_heads + head;
  const float* q = a.q + int64_t(row) * (a.nope + a.rope) + a.nope;
  const float *cosines = a.cos + int64_t(token) * half, *sines = a.sin + int64_t(token) * half;
  Query* query = queries + int64_t(row) * (a.rank + a.rope) + a.rank;
#pragma unroll 1
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const float2 pair = rotated(q[i], q[half + i], cosines[i], sines[i]);
    query[i] = from_float<Query>(pair.x), query[half + i] = from_float<Query>(pair.y);
  }
}

// Latent attention's queries [T, H, R + Q] with w_uk absorbed, and new rows. Blocks: (kBlockRows of R, H + 1, T), the last head for the
// row.
template <typename W, typename C, typename Query, int kPiece>
__global__ void __launch_bounds__(kThreads) latent_few(mythos_cuda_attention a, Query* queries) {
  extern __shared__ float q[];  // [N]
  __shared__ float scratch[kWarps];
  const int token = blockIdx.z, head = blockIdx.y, first = blockIdx.x * kBlockRows;
  const int64_t at = int64_t(token) * a.n_heads + head;
  const W* w_uk = static_cast<const W*>(a.w_uk) + (int64_t(head) * a.rank + first) * a.nope;
  const int count = min(kBlockRows, a.rank - first);
  constexpr int kRows = kBlockRows / (kThreads / kLanes);  // of a thread
  const int lane = threadIdx.x % kLanes, first_row = threadIdx.x / kLanes * kRows;
  // What a thread reads first is there before the wait.
  Piece<W, kPiece> pieces[kRows];
  const auto load = [&](int i) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) pieces[row].load_kept(w_uk + min(first_row + row, count - 1) * a.nope + i);
  };
  if (head < a.n_heads) {
    prefetch(w_uk, int64_t(count) * a.nope * sizeof(W));
    if (lane * kPiece < a.nope) load(lane * kPiece);
  }
  wait_for_previous();
  if (head == a.n_heads) {
    if (blockIdx.x == 0) make_row<C>(a, token, scratch);
    return;
  }
  if (blockIdx.x == 0) turn_query(a, token, head, queries);
#pragma unroll 1
  for (int i = threadIdx.x; i < a.nope; i += kThreads) q[i] = a.q[at * (a.nope + a.rope) + i];
  __syncthreads();
  float sum[kRows] = {};
#pragma unroll 1
  for (int i = lane * kPiece; i < a.nope; i += kLanes * kPiece) {
    float x[kPiece], w[kPiece];
    if (i != lane * kPiece) load(i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) x[j] = q[i + j];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      pieces[row].unpack(w);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) sum[row] = fmaf(w[j], x[j], sum[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], distance);
    if (lane == 0 && first_row + row < count) queries[at * (a.rank + a.rope) + first + first_row + row] = from_float<Query>(sum[row]);
  }
}

// The same without the products: the turned part, the part that w_uk is multiplied with rounded to its dtype [T, H, N], and new
// rows. Blocks: (H + 1, T).
template <typename W, typename C>
__global__ void __launch_bounds__(kThreads) latent_many(mythos_cuda_attention a, C* queries, W* rounded) {
  __shared__ float scratch[kWarps];
  wait_for_previous();
  const int token = blockIdx.y, head = blockIdx.x;
  if (head == a.n_heads) return make_row<C>(a, token, scratch);
  turn_query(a, token, head, queries);
  const int64_t at = int64_t(token) * a.n_heads + head;
#pragma unroll 1
  for (int i = threadIdx.x; i < a.nope; i += kThreads) rounded[at * a.nope + i] = from_float<W>(a.q[at * (a.nope + a.rope) + i]);
}

// Grouped-query attention's queries [T, H, V] and new rows. Blocks: (H + 2G, T).
template <typename C, typename Query>
__global__ void __launch_bounds__(kThreads) grouped(mythos_cuda_attention a, Shape n, Query* queries) {
  wait_for_previous();
  const int token = blockIdx.y, head = blockIdx.x, dim = a.v_head_dim, half = dim / 2, key = head - a.n_heads;
  const float* in = a.q + (int64_t(token) * (a.n_heads + 2 * a.n_kv_heads) + head) * dim;
  C* row = static_cast<C*>(a.new_kv) + (int64_t(token) * 2 * a.n_kv_heads + key) * dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const bool turns = key < a.n_kv_heads;
    const int64_t at = int64_t(token) * half + i;
    const float2 pair = turns ? rotated(in[i], in[half + i], a.cos[at], a.sin[at]) : float2{in[i], in[half + i]};
    if (key < 0) {
      Query* query = queries + n.query_of(token, head) * dim;
      query[i] = from_float<Query>(pair.x), query[half + i] = from_float<Query>(pair.y);
    } else {
      row[i] = from_float<C>(pair.x), row[half + i] = from_float<C>(pair.y);
    }
  }
}

template <typename W, typename C, typename Query>
cudaError_t make(const mythos_cuda_attention& a, const Shape& n, Query* queries, cudaStream_t stream) {
  const int tokens = a.batch * a.seq;
  if (a.n_kv_heads > 0) return launch_kernel(grouped<C, Query>, dim3(a.n_heads + 2 * a.n_kv_heads, tokens), kThreads, 0, stream, a, n, queries);
  const dim3 blocks(ceil_div(a.rank, kBlockRows), a.n_heads + 1, tokens);
  return with_piece(a.nope, [&](auto piece) {
    return launch_kernel(latent_few<W, C, Query, piece()>, blocks, kThreads, a.nope * sizeof(float), stream, a, queries);
  });
}

}  // namespace

template <typename W, typename C>
cudaError_t make_queries(const mythos_cuda_attention& a, const Shape& n, const Ways& ways, const AttentionWorkspace& w, cudaStream_t stream) {
  if constexpr (std::is_same_v<C, float>) {
    return make<W, C>(a, n, static_cast<float*>(w.queries), stream);
  } else {
    if (!ways.tensor_cores) return make<W, C>(a, n, static_cast<float*>(w.queries), stream);
    C* queries = static_cast<C*>(w.queries);
    if constexpr (!std::is_same_v<W, float>)
      if (ways.many_tokens) {
        const int tokens = a.batch * a.seq;
        const auto rounded = static_cast<W*>(w.rounded);
        const cudaError_t error = launch_kernel(latent_many<W, C>, dim3(a.n_heads + 1, tokens), kThreads, 0, stream, a, queries, rounded);
        if (error != cudaSuccess) return error;
        return multiply_heads<W, C>({tokens, a.n_heads, a.nope, a.rank, n.key_dim}, rounded, static_cast<const W*>(a.w_uk), queries, stream);
      }
    return make<W, C>(a, n, queries, stream);
  }
}

#define MYTHOS_MAKE_QUERIES(W, C) \
  template cudaError_t make_queries<W, C>(const mythos_cuda_attention&, const Shape&, const Ways&, const AttentionWorkspace&, cudaStream_t);
#define MYTHOS_MAKE_QUERIES_OF(W) MYTHOS_MAKE_QUERIES(W, float) MYTHOS_MAKE_QUERIES(W, __half) MYTHOS_MAKE_QUERIES(W, __nv_bfloat16)
MYTHOS_MAKE_QUERIES_OF(float)
MYTHOS_MAKE_QUERIES_OF(__half)
MYTHOS_MAKE_QUERIES_OF(__nv_bfloat16)

}  // namespace mythos::cuda
