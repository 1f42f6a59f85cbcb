// Before attention: queries as they are compared with rows, and the new rows. More letters: N qk_nope_head_dim, R kv_lora_rank.
#include "attention_flash.cuh"
#include "attention_heads.cuh"
#include "launch.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kLanes = 8;  // that a row of w_uk is read by
constexpr int kBlockRows = 64;  // of w_uk

// How a new row's numbers are rounded to those of the cache.
template <typename C>
struct Rounding {
  __device__ __forceinline__ C operator()(float x) const { return from_float<C>(x); }
};
// Int8 as runtimes/native/attend.cc has it: nearest, ties to even; a row with what is no number gets such a scale.
template <>
struct Rounding<int8_t> {
  float scale, inverse;

  // largest: of this thread's share of the row, as larger_of has it. The row's scale is written.
  __device__ __forceinline__ Rounding(const mythos_cuda_attention& a, int token, uint32_t largest, float* scratch) {
    const float own = largest_of_block(largest, scratch);
    const bool fixed = a.row_scale > 0.0f;
    scale = fixed ? a.row_scale : own / 127.0f;
    inverse = fixed || own > 1e-30f ? (fixed ? 1.0f : 127.0f) / (fixed ? scale : own) : 0.0f;
    if (threadIdx.x == 0) a.new_scale[token] = scale;
  }
  __device__ __forceinline__ int8_t operator()(float x) const {
    return static_cast<int8_t>(__float2int_rn(fminf(fmaxf(x * inverse, -127.0f), 127.0f)));
  }

  // The larger magnitude, as bits: what is no number is larger than all.
  static __device__ __forceinline__ uint32_t larger_of(uint32_t bits, float x) { return max(bits, __float_as_uint(fabsf(x))); }
  static __device__ __forceinline__ float largest_of_block(uint32_t bits, float* scratch) {
    bits = __reduce_max_sync(0xffffffffu, bits);
    __syncthreads();  // scratch may still be read
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = __uint_as_float(bits);
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) bits = max(bits, __float_as_uint(scratch[warp]));
    return __uint_as_float(bits);
  }
};

// A latent row: normalized, and turned by its position. Waits for the kernels before; what it reads is asked for together.
template <typename C>
__device__ __forceinline__ void make_row(const mythos_cuda_attention& a, int token, float* scratch) {
  const int half = a.rope / 2, width = a.rank + a.rope;
  const float *kv = a.kv + int64_t(token) * width, *cosines = a.cos + int64_t(token) * half, *sines = a.sin + int64_t(token) * half;
  C* row = static_cast<C*>(a.new_kv) + int64_t(token) * width;
  constexpr int kPieces = 512 / kThreads;  // R is at most 512
  float values[kPieces], norm[kPieces], squares = 0.0f;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int i = threadIdx.x + piece * kThreads;
    norm[piece] = i < a.rank ? a.kv_norm[i] : 0.0f;
  }
  wait_for_previous();
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int i = threadIdx.x + piece * kThreads;
    values[piece] = i < a.rank ? kv[i] : 0.0f;
  }
  const auto turn = [&](int i) { return rotated(kv[a.rank + i], kv[a.rank + half + i], cosines[i], sines[i]); };
  const int own = threadIdx.x;
  const float2 first = own < half ? turn(own) : float2{};
  const auto turned = [&](int i) { return i == own ? first : turn(i); };
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) squares = fmaf(values[piece], values[piece], squares);
  const float factor = inverse_rms(sum_of_block<kWarps>(squares, scratch), a.rank, a.epsilon);
  const auto write = [&](const Rounding<C>& rounded) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int i = threadIdx.x + piece * kThreads;
      if (i < a.rank) row[i] = rounded(values[piece] * factor * norm[piece]);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < half; i += kThreads) {
      const float2 pair = turned(i);
      row[a.rank + i] = rounded(pair.x), row[a.rank + half + i] = rounded(pair.y);
    }
  };
  if constexpr (std::is_same_v<C, int8_t>) {
    uint32_t largest = 0;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int i = threadIdx.x + piece * kThreads;
      if (i < a.rank) largest = Rounding<C>::larger_of(largest, values[piece] * factor * norm[piece]);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < half; i += kThreads) {
      const float2 pair = turned(i);
      largest = Rounding<C>::larger_of(Rounding<C>::larger_of(largest, pair.x), pair.y);
    }
    write(Rounding<C>(a, token, largest, scratch));
  } else {
    write(Rounding<C>());
  }
}

// The parts of some heads' queries that a token's position turns.
template <typename Query>
__device__ __forceinline__ void turn_queries(const mythos_cuda_attention& a, int token, int first_head, int heads, Query* queries) {
  const int half = a.rope / 2;
  if (half == 0) return;
  const float *cosines = a.cos + int64_t(token) * half, *sines = a.sin + int64_t(token) * half;
#pragma unroll 2
  for (Place at(threadIdx.x, half); at.row < heads; at.move(kThreads, half)) {
    const int64_t row = int64_t(token) * a.n_heads + first_head + at.row;
    const float* q = a.q + row * (a.nope + a.rope) + a.nope;
    Query* query = queries + row * (a.rank + a.rope) + a.rank;
    const float2 pair = rotated(q[at.piece], q[half + at.piece], cosines[at.piece], sines[at.piece]);
    query[at.piece] = from_float<Query>(pair.x), query[half + at.piece] = from_float<Query>(pair.y);
  }
}

// Latent attention's queries [T, H, R + Q] with w_uk absorbed, and new rows. Blocks: (kBlockRows of R, H + 1, T); of the last head, the
// first block is for the row, the last one for what positions turn.
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
  if (head == a.n_heads) {
    if (blockIdx.x == 0) make_row<C>(a, token, scratch);
    wait_for_previous();
    if (blockIdx.x == gridDim.x - 1) turn_queries(a, token, 0, a.n_heads, queries);
    return;
  }
  prefetch(w_uk, int64_t(count) * a.nope * sizeof(W));
  if (lane * kPiece < a.nope) load(lane * kPiece);
  wait_for_previous();
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
__global__ void __launch_bounds__(kThreads) latent_many(mythos_cuda_attention a, CacheNumber<C>* queries, W* rounded) {
  __shared__ float scratch[kWarps];
  wait_for_previous();
  const int token = blockIdx.y, head = blockIdx.x;
  if (head == a.n_heads) return make_row<C>(a, token, scratch);
  turn_queries(a, token, head, 1, queries);
  const int64_t at = int64_t(token) * a.n_heads + head;
#pragma unroll 1
  for (int i = threadIdx.x; i < a.nope; i += kThreads) rounded[at * a.nope + i] = from_float<W>(a.q[at * (a.nope + a.rope) + i]);
}

// Two numbers of a head of a token, `in`, half a head apart: turned, but for values. key: the head among keys, then values; below 0 of
// queries.
__device__ __forceinline__ float2 pair_of_head(const mythos_cuda_attention& a, const float* in, int token, int key, int i) {
  const int half = a.v_head_dim / 2;
  const int64_t at = int64_t(token) * half + i;
  return key < a.n_kv_heads ? rotated(in[i], in[half + i], a.cos[at], a.sin[at]) : float2{in[i], in[half + i]};
}

// A grouped-query row of int8, all of whose heads share its scale.
__device__ __forceinline__ void make_int8_heads(const mythos_cuda_attention& a, int token) {
  __shared__ float scratch[kWarps];
  const int dim = a.v_head_dim, half = dim / 2, pairs = 2 * a.n_kv_heads * half;
  const float* heads = a.q + (int64_t(token) * (a.n_heads + 2 * a.n_kv_heads) + a.n_heads) * dim;
  int8_t* row = static_cast<int8_t*>(a.new_kv) + int64_t(token) * 2 * a.n_kv_heads * dim;
  const auto pair_at = [&](int key, int i) { return pair_of_head(a, heads + key * dim, token, key, i); };
  uint32_t largest = 0;
#pragma unroll 4
  for (int at = threadIdx.x; at < pairs; at += kThreads) {
    const float2 pair = pair_at(at / half, at % half);
    largest = Rounding<int8_t>::larger_of(Rounding<int8_t>::larger_of(largest, pair.x), pair.y);
  }
  const Rounding<int8_t> rounded(a, token, largest, scratch);
#pragma unroll 1
  for (int at = threadIdx.x; at < pairs; at += kThreads) {
    const int key = at / half, i = at % half;
    const float2 pair = pair_at(key, i);
    row[key * dim + i] = rounded(pair.x), row[key * dim + half + i] = rounded(pair.y);
  }
}

// Grouped-query attention's queries [T, H, V] and new rows. Blocks: (H + 2G, T); of int8 caches (H + 1, T), the last for the row.
template <typename C, typename Query>
__global__ void __launch_bounds__(kThreads) grouped(mythos_cuda_attention a, Shape n, Query* queries) {
  wait_for_previous();
  const int token = blockIdx.y, head = blockIdx.x, dim = a.v_head_dim, half = dim / 2, key = head - a.n_heads;
  const float* in = a.q + (int64_t(token) * (a.n_heads + 2 * a.n_kv_heads) + head) * dim;
  C* row = static_cast<C*>(a.new_kv) + (int64_t(token) * 2 * a.n_kv_heads + key) * dim;
  constexpr bool kInt8 = std::is_same_v<C, int8_t>;
  if constexpr (kInt8)
    if (key >= 0) return make_int8_heads(a, token);
#pragma unroll 1
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const float2 pair = pair_of_head(a, in, token, key, i);
    if (kInt8 || key < 0) {
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
  const int rows = std::is_same_v<C, int8_t> ? 1 : 2 * a.n_kv_heads;  // blocks that make a token's row
  if (a.n_kv_heads > 0) return launch_kernel(grouped<C, Query>, dim3(a.n_heads + rows, tokens), kThreads, 0, stream, a, n, queries);
  const dim3 blocks(ceil_div(a.rank, kBlockRows), a.n_heads + 1, tokens);
  return with_piece(a.nope, [&](auto piece) {
    return launch_kernel({1, n.has_many_parts()}, latent_few<W, C, Query, piece()>, blocks, kThreads, a.nope * sizeof(float), stream, a, queries);
  });
}

}  // namespace

template <typename W, typename C>
cudaError_t make_queries(const mythos_cuda_attention& a, const Shape& n, const Ways& ways, const AttentionWorkspace& w, cudaStream_t stream) {
  if constexpr (std::is_same_v<C, float>) {
    return make<W, C>(a, n, static_cast<float*>(w.queries), stream);
  } else {
    if (!ways.tensor_cores) return make<W, C>(a, n, static_cast<float*>(w.queries), stream);
    using Query = CacheNumber<C>;
    Query* queries = static_cast<Query*>(w.queries);
    if constexpr (!std::is_same_v<W, float>)
      if (ways.many_tokens) {
        const int tokens = a.batch * a.seq;
        const auto rounded = static_cast<W*>(w.rounded);
        const cudaError_t error = launch_kernel(latent_many<W, C>, dim3(a.n_heads + 1, tokens), kThreads, 0, stream, a, queries, rounded);
        if (error != cudaSuccess) return error;
        return multiply_heads<W, Query>({tokens, a.n_heads, a.nope, a.rank, n.key_dim}, rounded, static_cast<const W*>(a.w_uk), queries, stream);
      }
    return make<W, C>(a, n, queries, stream);
  }
}

#define MYTHOS_MAKE_QUERIES(W, C) \
  template cudaError_t make_queries<W, C>(const mythos_cuda_attention&, const Shape&, const Ways&, const AttentionWorkspace&, cudaStream_t);
#define MYTHOS_MAKE_QUERIES_OF(W) \
  MYTHOS_MAKE_QUERIES(W, float) MYTHOS_MAKE_QUERIES(W, __half) MYTHOS_MAKE_QUERIES(W, __nv_bfloat16) MYTHOS_MAKE_QUERIES(W, int8_t)
MYTHOS_MAKE_QUERIES_OF(float)
MYTHOS_MAKE_QUERIES_OF(__half)
MYTHOS_MAKE_QUERIES_OF(__nv_bfloat16)

}  // namespace mythos::cuda
