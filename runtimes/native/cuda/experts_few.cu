// Experts on few tokens: the time is that of reading the chosen experts once.
//
// A pair is a token and one of its experts. Shape letters: T tokens, D dim, E routed experts, S shared experts, K top_k,
// F expert_dim.
#include <algorithm>
#include <utility>

#include "experts.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace mythos::cuda {
namespace {

constexpr int kMostInnerRows = 4;  // rows of gate, and of up, that a warp computes one after another
constexpr int kWantedBlocks = 264;
constexpr int kOuterRows = 4;  // rows of down that a warp computes at the same time
constexpr int kSharedBytes = 96 * 1024;
constexpr int kPrefetched = 32 * 1024;  // bytes of the shared experts that a block asks for while it waits

struct Tokens {
  const float *values, *norm;
  float epsilon;
};

template <typename W>
struct Stacks {
  const W *routed, *shared;
};

// silu(gate . x) * (up . x) of kTokens tokens, for the rows of F of this block's second dimension.
template <typename W, int kTokens, int kPiece>
__device__ __forceinline__ void inner_rows_of(const W* gate_up, const Tokens& tokens, const SharedTokens<kTokens, kPiece>& x, const Sizes& n,
                                              int rows_of_warp, float* const (&out)[kTokens]) {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int i = 0; i < rows_of_warp; ++i) {
    const int f = (blockIdx.y * kRowWarps + warp) * rows_of_warp + i;
    if (f >= n.expert_dim) return;
    const W* const rows[2] = {gate_up + int64_t(f) * n.dim, gate_up + int64_t(n.expert_dim + f) * n.dim};
    float sum[2][kTokens] = {};
    add_products<W, 2, kTokens, kPiece>(rows, 0, n.dim, x, sum);
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const float gate = sum_of_warp(sum[0][token]), up = sum_of_warp(sum[1][token]);
      if (threadIdx.x % 32 != 0 || out[token] == nullptr) continue;
      const float factor = x.factor(token, tokens.norm, tokens.epsilon);
      out[token][f] = silu(gate * factor) * (up * factor);
    }
  }
}

// inner [TK + TS, F]. Blocks: (pairs of routed experts, then each shared expert's tokens, kTokens at a time; rows of F).
template <typename W, int kTokens, int kPiece>
__global__ void __launch_bounds__(kRowThreads) inner_few(Sizes n, Tokens tokens, const int32_t* chosen, Stacks<W> gate_up, int rows_of_warp, float* inner) {
  extern __shared__ float4 memory[];
  const int pairs = n.tokens * n.top_k, pair = blockIdx.x;
  const bool routed = pair < pairs;
  const int passes = (n.tokens + kTokens - 1) / kTokens;
  const int shared = routed ? 0 : (pair - pairs) / passes;
  if (!routed) {
    const W* stack = gate_up.shared + int64_t(shared) * 2 * n.expert_dim * n.dim;
    const int f0 = blockIdx.y * kRowWarps * rows_of_warp;
    const int rows = min(min(kPrefetched / int(n.dim * sizeof(W)) / 2, kRowWarps * rows_of_warp), n.expert_dim - f0);
    prefetch(stack + int64_t(f0) * n.dim, int64_t(rows) * n.dim * sizeof(W));
    prefetch(stack + int64_t(n.expert_dim + f0) * n.dim, int64_t(rows) * n.dim * sizeof(W));
  }
  wait_for_previous();
  const int first = routed ? pair / n.top_k : (pair - pairs) % passes * kTokens;
  const int count = routed ? 1 : min(kTokens, n.tokens - first);
  const float* values = tokens.values + int64_t(first) * n.dim;
  const int64_t size = int64_t(2) * n.expert_dim * n.dim;
  const auto run = [&](auto most, const W* matrices, auto&& out) {
    constexpr int kMost = decltype(most)::value;
    const SharedTokens<kMost, kPiece> x(memory, n.dim);
    x.fill(values, count, tokens.norm);
    __syncthreads();
    inner_rows_of<W, kMost, kPiece>(matrices, tokens, x, n, rows_of_warp, out);
  };
  using One = std::integral_constant<int, 1>;
  if constexpr (kTokens == 1) {
    const int64_t row = routed ? pair : int64_t(pairs) + int64_t(shared) * n.tokens + first;
    float* const out[1] = {inner + row * n.expert_dim};
    run(One(), routed ? gate_up.routed + clamp_expert(chosen[pair], n) * size : gate_up.shared + shared * size, out);
  } else if (routed) {
    float* const out[1] = {inner + int64_t(pair) * n.expert_dim};
    run(One(), gate_up.routed + clamp_expert(chosen[pair], n) * size, out);
  } else {
    float* out[kTokens];
#pragma unroll
    for (int token = 0; token < kTokens; ++token)
      out[token] = token < count ? inner + (int64_t(pairs) + int64_t(shared) * n.tokens + first + token) * n.expert_dim : nullptr;
    run(std::integral_constant<int, kTokens>(), gate_up.shared + shared * size, out);
  }
}

// mixed [T, D]: blocks are (tokens, kOuterRows rows of D). Warps share `parts` parts of F of each of a token's experts out among
// themselves; the sum over all has one order.
template <typename W, int kPiece>
__global__ void __launch_bounds__(kRowThreads)
    outer_few(Sizes n, const int32_t* chosen, const float* weight, Stacks<W> down, const float* inner, const float* residual,
              int parts, float* mixed) {
  extern __shared__ float partial[];  // [experts of a token, parts, kOuterRows]
  constexpr int kStep = 32 * kPiece;
  for (int shared = 0; shared < min(n.shared, kPrefetched / int(kOuterRows * n.expert_dim * sizeof(W))); ++shared)
    prefetch(down.shared + (int64_t(shared) * n.dim + blockIdx.y * kOuterRows) * n.expert_dim,
             int64_t(min(kOuterRows, n.dim - int(blockIdx.y) * kOuterRows)) * n.expert_dim * sizeof(W));
  wait_for_previous();
  const int token = blockIdx.x, d0 = blockIdx.y * kOuterRows, warp = threadIdx.x / 32;
  // What the sums are added to is there when they are.
  const bool writes = threadIdx.x < kOuterRows && d0 + threadIdx.x < n.dim;
  const int64_t at = int64_t(token) * n.dim + d0 + threadIdx.x;
  const float added = writes && residual != nullptr ? residual[at] : 0.0f;
  const int experts = n.top_k + n.shared, of_part = (n.expert_dim / parts + kStep - 1) / kStep * kStep;
#pragma unroll 1
  for (int item = warp; item < parts * experts; item += kRowWarps) {
    const int slot = item / parts, from = min(item % parts * of_part, n.expert_dim), pair = token * n.top_k + slot;
    const bool routed = slot < n.top_k;
    const int expert = routed ? clamp_expert(chosen[pair], n) : slot - n.top_k;
    const W* stack = (routed ? down.routed : down.shared) + int64_t(expert) * n.dim * n.expert_dim;
    const int64_t row = routed ? pair : int64_t(n.tokens) * n.top_k + int64_t(expert) * n.tokens + token;
    const W* rows[kOuterRows];
#pragma unroll
    for (int i = 0; i < kOuterRows; ++i) rows[i] = stack + int64_t(min(d0 + i, n.dim - 1)) * n.expert_dim;
    float sum[kOuterRows][1] = {};
    const GlobalToken<kPiece> x{inner + row * n.expert_dim};
    add_products<W, kOuterRows, 1, kPiece>(rows, from, (item + 1) % parts == 0 ? n.expert_dim : min(from + of_part, n.expert_dim), x, sum);
    const float scale = routed ? weight[pair] : 1.0f;
#pragma unroll
    for (int i = 0; i < kOuterRows; ++i) {
      const float total = sum_of_warp(sum[i][0]);
      if (threadIdx.x % 32 == 0) partial[item * kOuterRows + i] = scale * total;
    }
  }
  __syncthreads();
  if (!writes) return;
  float total = 0.0f;
#pragma unroll 4
  for (int item = 0; item < parts * experts; ++item) total += partial[item * kOuterRows + threadIdx.x];
  mixed[at] = added + total;
}

template <typename W, int kTokens, int kPiece>
cudaError_t launch_inner(const mythos_cuda_experts& e, const Sizes& n, float* inner, cudaStream_t stream) {
  const Stacks<W> gate_up{static_cast<const W*>(e.gate_up_routed), static_cast<const W*>(e.gate_up_shared)};
  const size_t bytes = SharedTokens<kTokens, kPiece>::bytes(e.dim);
  const int items = pairs(e) + e.shared * ceil_div(e.tokens, kTokens), row_blocks = ceil_div(e.expert_dim, kRowWarps);
  const int rows_of_warp = std::max(1, std::min(kMostInnerRows, items * row_blocks / kWantedBlocks));
  const Tokens tokens{e.normed, e.norm, e.epsilon};
  return launch_kernel(inner_few<W, kTokens, kPiece>, dim3(items, ceil_div(row_blocks, rows_of_warp)), kRowThreads, bytes, stream, n, tokens,
                       e.chosen, gate_up, rows_of_warp, inner);
}

template <typename W, int kPiece>
cudaError_t launch_outer(const mythos_cuda_experts& e, const Sizes& n, const float* inner, cudaStream_t stream) {
  const Stacks<W> down{static_cast<const W*>(e.down_routed), static_cast<const W*>(e.down_shared)};
  const dim3 blocks(e.tokens, ceil_div(e.dim, kOuterRows));
  const int experts = e.top_k + e.shared, parts = experts >= kRowWarps / 2 ? 2 : ceil_div(kRowWarps, experts);
  const size_t bytes = experts * parts * kOuterRows * sizeof(float);
  return launch_kernel(outer_few<W, kPiece>, blocks, kRowThreads, bytes, stream, n, e.chosen, e.weight, down, inner, e.residual, parts,
                       e.mixed);
}

template <typename W, int kPiece>
cudaError_t launch_inner(const mythos_cuda_experts& e, const Sizes& n, float* inner, cudaStream_t stream) {
  // As many at a time as shared memory holds on every GPU.
  if (e.tokens >= 4 && SharedTokens<4, kPiece>::bytes(e.dim) <= kSharedBytes) return launch_inner<W, 4, kPiece>(e, n, inner, stream);
  if (e.tokens >= 2 && SharedTokens<2, kPiece>::bytes(e.dim) <= kSharedBytes) return launch_inner<W, 2, kPiece>(e, n, inner, stream);
  return launch_inner<W, 1, kPiece>(e, n, inner, stream);
}

}  // namespace

uint64_t few_workspace(const mythos_cuda_experts& e) {
  Arena arena(nullptr);
  arena.take<float>(inner_rows(e) * e.expert_dim);
  return arena.used();
}

template <typename W>
cudaError_t launch_few(const mythos_cuda_experts& e, cudaStream_t stream) {
  const Sizes n = sizes_of(e);
  float* inner = Arena(e.workspace).take<float>(inner_rows(e) * e.expert_dim);
  const cudaError_t error = with_piece(e.dim, [&](auto piece) { return launch_inner<W, piece()>(e, n, inner, stream); });
  if (error != cudaSuccess) return error;
  return with_piece(e.expert_dim, [&](auto piece) { return launch_outer<W, piece()>(e, n, inner, stream); });
}

template cudaError_t launch_few<float>(const mythos_cuda_experts&, cudaStream_t);
template cudaError_t launch_few<__half>(const mythos_cuda_experts&, cudaStream_t);
template cudaError_t launch_few<__nv_bfloat16>(const mythos_cuda_experts&, cudaStream_t);

}  // namespace mythos::cuda
