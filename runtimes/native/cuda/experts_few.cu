// Experts on few tokens: the time is that of reading the chosen experts once, so a warp reads whole rows and nothing else counts.
//
// A pair is a token and one of its experts. Shape letters: T tokens, D dim, E routed experts, S shared experts, K top_k,
// F expert_dim.
#include "experts.cuh"
#include "numbers.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStep = 32 * kEight;  // numbers of a row that a warp reads at a time
constexpr int kInnerRows = 4;       // rows of gate, and of up, that a warp computes one after another
constexpr int kOuterRows = 4;       // rows of down that a warp computes at the same time
constexpr int kAhead = 4;           // steps whose loads run at the same time
constexpr int kSharedBytes = 96 * 1024;

template <typename W>
struct Stacks {
  const W *routed, *shared;
};

// Adds a lane's part of the sum over k, from first to last, of each row times each token. read: eight numbers of a token, or one.
// kVector: rows are whole pieces of kEight, aligned.
template <typename W, int kRows, int kTokens, bool kVector, typename Read>
__device__ __forceinline__ void add_products(const W* const (&rows)[kRows], int first, int last, Read read, float (&sum)[kRows][kTokens]) {
  const int lane = threadIdx.x % 32;
  if constexpr (kVector) {
    constexpr int kSteps = kRows >= 4 ? 2 : kAhead;
    int k = first + lane * kEight;
    for (; k + (kSteps - 1) * kStep < last; k += kSteps * kStep) {
      Eight<W> loaded[kSteps][kRows];
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int row = 0; row < kRows; ++row) loaded[step][row].load(rows[row] + k + step * kStep);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        float x[kTokens][kEight];
#pragma unroll
        for (int token = 0; token < kTokens; ++token) read(token, k + step * kStep, x[token]);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          float w[kEight];
          loaded[step][row].unpack(w);
#pragma unroll
          for (int token = 0; token < kTokens; ++token)
#pragma unroll
            for (int i = 0; i < kEight; ++i) sum[row][token] = fmaf(w[i], x[token][i], sum[row][token]);
        }
      }
    }
    for (; k < last; k += kStep) {
      Eight<W> loaded[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) loaded[row].load(rows[row] + k);
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        float x[kEight];
        read(token, k, x);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          float w[kEight];
          loaded[row].unpack(w);
#pragma unroll
          for (int i = 0; i < kEight; ++i) sum[row][token] = fmaf(w[i], x[i], sum[row][token]);
        }
      }
    }
  } else {
    for (int k = first + lane; k < last; k += 32)
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const float x = read(token, k);
#pragma unroll
        for (int row = 0; row < kRows; ++row) sum[row][token] = fmaf(to_float(rows[row][k]), x, sum[row][token]);
      }
  }
}

// Tokens in shared memory, each as its numbers 0 to 3 of every eight, then 4 to 7: lanes read without conflicts.
struct SharedTokens {
  const float4* values;
  int pieces;  // of eight numbers a token

  __device__ __forceinline__ void operator()(int token, int k, float (&x)[kEight]) const {
    const float4 low = values[2 * token * pieces + k / kEight], high = values[(2 * token + 1) * pieces + k / kEight];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
  __device__ __forceinline__ float operator()(int token, int k) const {
    const float* half = reinterpret_cast<const float*>(values + (2 * token + k % kEight / 4) * pieces + k / kEight);
    return half[k % 4];
  }
};

// silu(gate . x) * (up . x) of kTokens tokens, for the rows of F of this block's second dimension.
template <typename W, int kTokens, bool kVector>
__device__ __forceinline__ void inner_rows_of(const W* gate_up, const SharedTokens& x, const Sizes& n, float* const (&out)[kTokens]) {
  const int warp = threadIdx.x / 32;
  for (int i = 0; i < kInnerRows; ++i) {
    const int f = (blockIdx.y * kWarps + warp) * kInnerRows + i;
    if (f >= n.expert_dim) return;
    const W* const rows[2] = {gate_up + int64_t(f) * n.dim, gate_up + int64_t(n.expert_dim + f) * n.dim};
    float sum[2][kTokens] = {};
    add_products<W, 2, kTokens, kVector>(rows, 0, n.dim, x, sum);
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const float gate = sum_of_warp(sum[0][token]), up = sum_of_warp(sum[1][token]);
      if (threadIdx.x % 32 == 0 && out[token] != nullptr) out[token][f] = silu(gate) * up;
    }
  }
}

// inner [TK + TS, F]. Blocks: (pairs of routed experts, then each shared expert's tokens, kTokens at a time; rows of F).
template <typename W, int kTokens, bool kVector>
__global__ void __launch_bounds__(kThreads) inner_few(Sizes n, const float* normed, const int32_t* chosen, Stacks<W> gate_up, float* inner) {
  extern __shared__ float4 tokens[];
  const int pairs = n.tokens * n.top_k, pair = blockIdx.x;
  const bool routed = pair < pairs;
  const int passes = (n.tokens + kTokens - 1) / kTokens;
  const int shared = routed ? 0 : (pair - pairs) / passes;
  const int first = routed ? pair / n.top_k : (pair - pairs) % passes * kTokens;
  const int count = routed ? 1 : min(kTokens, n.tokens - first);
  const int pieces = (n.dim + kEight - 1) / kEight;
  for (int at = threadIdx.x; at < count * pieces * kEight; at += kThreads) {
    const int token = at / (pieces * kEight), k = at % (pieces * kEight);
    reinterpret_cast<float*>(tokens + (2 * token + k % kEight / 4) * pieces + k / kEight)[k % 4] =
        k < n.dim ? normed[int64_t(first + token) * n.dim + k] : 0.0f;
  }
  __syncthreads();
  const int64_t size = int64_t(2) * n.expert_dim * n.dim;
  const SharedTokens x{tokens, pieces};
  if (routed) {
    float* const out[1] = {inner + int64_t(pair) * n.expert_dim};
    inner_rows_of<W, 1, kVector>(gate_up.routed + clamp_expert(chosen[pair], n) * size, x, n, out);
  } else {
    float* out[kTokens];
#pragma unroll
    for (int token = 0; token < kTokens; ++token)
      out[token] = token < count ? inner + (int64_t(pairs) + int64_t(shared) * n.tokens + first + token) * n.expert_dim : nullptr;
    inner_rows_of<W, kTokens, kVector>(gate_up.shared + shared * size, x, n, out);
  }
}

struct InnerRow {
  const float* values;

  __device__ __forceinline__ void operator()(int, int k, float (&x)[kEight]) const {
    const float4 low = *reinterpret_cast<const float4*>(values + k), high = *reinterpret_cast<const float4*>(values + k + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
  __device__ __forceinline__ float operator()(int, int k) const { return values[k]; }
};

// mixed [T, D]: blocks are (tokens, kOuterRows rows of D). Warps share the halves of F of a token's experts out among themselves; the
// sum over experts has one order.
template <typename W, bool kVector>
__global__ void __launch_bounds__(kThreads)
    outer_few(Sizes n, const int32_t* chosen, const float* weight, Stacks<W> down, const float* inner, float* mixed) {
  extern __shared__ float partial[];  // [experts of a token, 2, kOuterRows]
  const int token = blockIdx.x, d0 = blockIdx.y * kOuterRows, warp = threadIdx.x / 32;
  const int experts = n.top_k + n.shared, half = (n.expert_dim / 2 + kStep - 1) / kStep * kStep;
  for (int item = warp; item < 2 * experts; item += kWarps) {
    const int slot = item / 2, pair = token * n.top_k + slot;
    const bool routed = slot < n.top_k;
    const int expert = routed ? clamp_expert(chosen[pair], n) : slot - n.top_k;
    const W* stack = (routed ? down.routed : down.shared) + int64_t(expert) * n.dim * n.expert_dim;
    const int64_t row = routed ? pair : int64_t(n.tokens) * n.top_k + int64_t(expert) * n.tokens + token;
    const W* rows[kOuterRows];
#pragma unroll
    for (int i = 0; i < kOuterRows; ++i) rows[i] = stack + int64_t(min(d0 + i, n.dim - 1)) * n.expert_dim;
    float sum[kOuterRows][1] = {};
    const InnerRow x{inner + row * n.expert_dim};
    add_products<W, kOuterRows, 1, kVector>(rows, item % 2 ? min(half, n.expert_dim) : 0, item % 2 ? n.expert_dim : min(half, n.expert_dim), x, sum);
    const float scale = routed ? weight[pair] : 1.0f;
#pragma unroll
    for (int i = 0; i < kOuterRows; ++i) {
      const float total = sum_of_warp(sum[i][0]);
      if (threadIdx.x % 32 == 0) partial[item * kOuterRows + i] = scale * total;
    }
  }
  __syncthreads();
  if (threadIdx.x < kOuterRows && d0 + threadIdx.x < n.dim) {
    float total = 0.0f;
    for (int item = 0; item < 2 * experts; ++item) total += partial[item * kOuterRows + threadIdx.x];
    mixed[int64_t(token) * n.dim + d0 + threadIdx.x] = total;
  }
}

template <typename W, int kTokens, bool kVector>
cudaError_t launch(const mythos_cuda_experts& e, cudaStream_t stream) {
  const Sizes n = sizes_of(e);
  const Stacks<W> gate_up{static_cast<const W*>(e.gate_up_routed), static_cast<const W*>(e.gate_up_shared)};
  const Stacks<W> down{static_cast<const W*>(e.down_routed), static_cast<const W*>(e.down_shared)};
  float* inner = Arena(e.workspace).take<float>(inner_rows(e) * e.expert_dim);
  const int tokens_bytes = kTokens * 2 * ceil_div(e.dim, kEight) * int(sizeof(float4));
  if (tokens_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(inner_few<W, kTokens, kVector>, cudaFuncAttributeMaxDynamicSharedMemorySize, tokens_bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 inner_grid(pairs(e) + e.shared * ceil_div(e.tokens, kTokens), ceil_div(e.expert_dim, kWarps * kInnerRows));
  inner_few<W, kTokens, kVector><<<inner_grid, kThreads, tokens_bytes, stream>>>(n, e.normed, e.chosen, gate_up, inner);
  const dim3 outer_grid(e.tokens, ceil_div(e.dim, kOuterRows));
  const int partial_bytes = (e.top_k + e.shared) * 2 * kOuterRows * int(sizeof(float));
  outer_few<W, kVector><<<outer_grid, kThreads, partial_bytes, stream>>>(n, e.chosen, e.weight, down, inner, e.mixed);
  return cudaGetLastError();
}

template <typename W, int kTokens>
cudaError_t launch_aligned(const mythos_cuda_experts& e, cudaStream_t stream) {
  const bool vector = e.dim % kEight == 0 && e.expert_dim % kEight == 0;
  return vector ? launch<W, kTokens, true>(e, stream) : launch<W, kTokens, false>(e, stream);
}

}  // namespace

uint64_t few_workspace(const mythos_cuda_experts& e) {
  Arena arena(nullptr);
  arena.take<float>(inner_rows(e) * e.expert_dim);
  return arena.used();
}

template <typename W>
cudaError_t launch_few(const mythos_cuda_experts& e, cudaStream_t stream) {
  // As many at a time as shared memory holds on every GPU.
  const int fit = kSharedBytes / (ceil_div(e.dim, kEight) * kEight * int(sizeof(float)));
  if (e.tokens >= 4 && fit >= 4) return launch_aligned<W, 4>(e, stream);
  return e.tokens >= 2 && fit >= 2 ? launch_aligned<W, 2>(e, stream) : launch_aligned<W, 1>(e, stream);
}

template cudaError_t launch_few<float>(const mythos_cuda_experts&, cudaStream_t);
template cudaError_t launch_few<__half>(const mythos_cuda_experts&, cudaStream_t);
template cudaError_t launch_few<__nv_bfloat16>(const mythos_cuda_experts&, cudaStream_t);

}  // namespace mythos::cuda
