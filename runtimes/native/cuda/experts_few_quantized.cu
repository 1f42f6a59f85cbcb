// Quantized experts on few tokens: the time is that of reading the chosen experts once.
//
// A pair is a token and one of its experts. Shape letters: T tokens, D dim, E routed experts, S shared experts, K top_k,
// F expert_dim.
#include <algorithm>

#include "experts.cuh"
#include "launch.cuh"
#include "quantized_rows.cuh"

namespace mythos::cuda {
namespace {

constexpr int kInnerThreads = 256, kInnerWarps = kInnerThreads / 32;
constexpr int kOuterThreads = 512, kOuterWarps = kOuterThreads / 32;
constexpr int kInnerBlocks = 264;  // for any GPU to be busy, and none of today's to begin a second round
constexpr int kMostTiles = 16;     // of a block
constexpr int kSharedBytes = 96 * 1024;

struct Inputs {
  const float *values, *norm;
  float epsilon;
  const int32_t* chosen;
  __nv_bfloat16* inner;  // [TK + TS, 2, plane of F]
};

// silu(gate . x) * (up . x) of kTokens tokens, for some rows of F of one expert, whose number `expert()` reads.
template <typename Q, typename S, bool kAligned, int kTokens, typename Expert>
__device__ __forceinline__ void inner_tiles(const Sizes& n, const Inputs& in, const QuantizedStack& gate_up, int most_tiles, int first_token,
                                            int count, int64_t inner_row, bool routed, const Expert& expert) {
  extern __shared__ uint4 memory[];
  const int all = (n.expert_dim + kTileRows - 1) / kTileRows, tile0 = blockIdx.y * most_tiles, tiles = min(most_tiles, all - tile0);
  const int f0 = tile0 * kTileRows, inner_plane = plane_of(n.expert_dim);
  const RowTilesMemory sizes(n.dim, most_tiles, kInnerWarps, kTokens, 2);
  auto* planes = reinterpret_cast<__nv_bfloat16*>(memory);
  uint4* zeros = memory + sizes.planes_bytes(kTokens) / 16;
  float* partial = reinterpret_cast<float*>(zeros + 4);
  __shared__ float squares[kTokens * kInnerWarps];
  clear<kInnerThreads>(zeros, partial, sizes.partial);
  // Which experts are chosen is known when the kernel before this one is complete, the shared ones' weights are there before.
  if (routed) wait_for_previous();
  RowTiles<Q, S, kAligned, 2, kInnerWarps> rows(gate_up, int64_t(expert()) * 2 * n.expert_dim + f0, n.expert_dim - f0, n.expert_dim, tiles);
  rows.begin();
  wait_for_previous();
  fill_planes<kInnerThreads>(planes, in.values + int64_t(first_token) * n.dim, count, n.dim, in.norm, squares);
  __syncthreads();
  rows.template run<kTokens>(SharedPlanes<Q>(planes, zeros, sizes.plane), partial);
  __syncthreads();
  const int end = tile0 + tiles == all ? inner_plane : f0 + tiles * kTileRows;  // the last tile writes the zeros behind it, too
#pragma unroll 1
  for (Turn at(threadIdx.x, end - f0); at.token < count; at.move(kInnerThreads)) {
    const int token = at.token, f = f0 + at.row;
    float gate = 0.0f, up = 0.0f;
    if (f < n.expert_dim) {
      const int tile = (f - f0) / kTileRows;
#pragma unroll
      for (int warp = 0; warp < kInnerWarps; ++warp) {
        const float* sums = partial + ((tile * kInnerWarps + warp) * kTokens + token) * 2 * kTileRows + f % kTileRows;
        gate += sums[0], up += sums[kTileRows];
      }
    }
    const float factor = factor_of<kInnerWarps>(squares, token, n.dim, in.norm, in.epsilon);
    put_in_planes(in.inner + (inner_row + token) * 2 * inner_plane, inner_plane, f, silu(gate * factor) * (up * factor));
  }
}

// inner. Blocks: (pairs of routed experts, then each shared expert's tokens, kTokens at a time; tiles of rows of F).
template <typename Q, typename S, bool kAligned, int kTokens>
__global__ void __launch_bounds__(kInnerThreads, 2)
    inner_quantized(Sizes n, Inputs in, QuantizedStack routed, QuantizedStack shared, int most_tiles) {
  const int pairs = n.tokens * n.top_k, pair = blockIdx.x;
  const bool is_routed = pair < pairs;
  const auto chosen = [&] { return clamp_expert(in.chosen[pair], n); };
  if (kTokens > 1 && is_routed) {
    inner_tiles<Q, S, kAligned, 1>(n, in, routed, most_tiles, pair / n.top_k, 1, pair, true, chosen);
    return;
  }
  // One token at a time: both kinds of experts run the same code, which each launch reads anew.
  const int passes = (n.tokens + kTokens - 1) / kTokens;
  const int expert = (pair - pairs) / passes, first = is_routed ? pair / n.top_k : (pair - pairs) % passes * kTokens;
  QuantizedStack stack = shared;
  if (is_routed) stack.values = routed.values, stack.scales = routed.scales;
  inner_tiles<Q, S, kAligned, kTokens>(n, in, stack, most_tiles, first, min(kTokens, n.tokens - first),
                                       is_routed ? pair : pairs + int64_t(expert) * n.tokens + first, is_routed,
                                       [&] { return is_routed ? chosen() : expert; });
}

// One expert of a token, as the second product reads it.
struct Slot {
  RowsFrom rows;               // of the expert's matrix, from the block's first on
  const __nv_bfloat16* inner;  // its planes
  float weight;
};

// Where a shared expert's first products of a token are.
__device__ __forceinline__ const __nv_bfloat16* inner_of_shared(const Sizes& n, const __nv_bfloat16* inner, int token, int expert) {
  return inner + (int64_t(n.tokens) * (n.top_k + expert) + token) * 2 * plane_of(n.expert_dim);
}

// A token's experts, shared ones first, by the whole block.
__device__ __forceinline__ void fill_slots(const Sizes& n, int token, int d0, const int32_t* chosen, const float* weight,
                                           const QuantizedStack& routed, const QuantizedStack& shared, const __nv_bfloat16* inner,
                                           Slot* slots) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n.shared + n.top_k; i += kOuterThreads) {
    const bool is_shared = i < n.shared;
    const int pair = token * n.top_k + i - n.shared, expert = is_shared ? i : clamp_expert(chosen[pair], n);
    slots[i] = {RowsFrom(is_shared ? shared : routed, int64_t(expert) * n.dim + d0),
                is_shared ? inner_of_shared(n, inner, token, i) : inner + int64_t(pair) * 2 * plane_of(n.expert_dim), is_shared ? 1.0f : weight[pair]};
  }
}

// mixed [T, D]: blocks are (tokens, tiles of sixteen rows of D). Warps share out the steps of all of a token's experts, the shared ones
// first; the sum has one order.
template <typename Q, typename S, bool kAligned>
__global__ void __launch_bounds__(kOuterThreads, 1)
    outer_quantized(Sizes n, const int32_t* chosen, const float* weight, QuantizedStack routed, QuantizedStack shared,
                    const __nv_bfloat16* inner, const float* residual, float* mixed) {
  extern __shared__ Slot slots[];  // [S + K]
  __shared__ float partial[kOuterWarps][kTileRows];
  constexpr int kAhead = 4, kUnits = kInSixteen<Q> / 8;
  const int token = blockIdx.x, d0 = blockIdx.y * kTileRows, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int experts = n.shared + n.top_k, steps = (shared.row_bytes + 63) / 64, plane = plane_of(n.expert_dim), last = n.dim - d0 - 1;
  Cursor at{0, 0};
  at.advance(warp, steps);
  Cursor ahead = at;
  LoadedRows<Q, S, kAligned> loaded[kAhead][1];
  // Weights of shared experts are read before the kernel before this one is complete.
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (ahead.tile < n.shared) loaded[i][0].load(shared, RowsFrom(shared, int64_t(ahead.tile) * n.dim + d0), 0, last, ahead.step);
    ahead.advance(kOuterWarps, steps);
  }
  wait_for_previous();
  // What the sums are added to is there when they are.
  const bool writes = threadIdx.x < kTileRows && d0 + threadIdx.x < n.dim;
  const int64_t to = int64_t(token) * n.dim + d0 + threadIdx.x;
  const float added = writes && residual != nullptr ? residual[to] : 0.0f;
  const bool mine = lane / 4 % 4 == lane % 4;
  uint4 x[2][kUnits];  // of this step and of the next
  const auto read_from = [&](uint4 (&to)[kUnits], const __nv_bfloat16* planes, int step) {
    const auto* from = reinterpret_cast<const uint4*>(planes + lane / 16 * plane + (step * 4 + lane % 4) * kInSixteen<Q>);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) to[unit] = mine ? __ldcg(from + unit) : uint4{0, 0, 0, 0};
  };
  if (at.tile < n.shared) read_from(x[0], inner_of_shared(n, inner, token, at.tile), at.step);
  fill_slots(n, token, d0, chosen, weight, routed, shared, inner, slots);
  __syncthreads();
  const auto load = [&](int i, const Cursor& from) {
    if (from.tile < experts) loaded[i][0].load(shared, slots[from.tile].rows, 0, last, from.step);
  };
  ahead = at;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (ahead.tile >= n.shared) load(i, ahead);
    ahead.advance(kOuterWarps, steps);
  }
  const auto read = [&](uint4 (&to)[kUnits], const Cursor& cursor) {
    if (cursor.tile < experts) read_from(to, slots[cursor.tile].inner, cursor.step);
  };
  if (at.tile >= n.shared) read(x[0], at);
  float total[2] = {};
#pragma unroll 1
  while (at.tile < experts) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (at.tile >= experts) break;
      const float scale = slots[at.tile].weight;
      at.advance(kOuterWarps, steps);
      read(x[(i + 1) % 2], at);
      __syncwarp();  // a product is of all lanes
      float sum[1][1][2] = {};
      add_step<Q, 1>(loaded[i], [&](int, int unit) { return x[i % 2][unit]; }, sum);
      total[0] = fmaf(scale, sum[0][0][0], total[0]), total[1] = fmaf(scale, sum[0][0][1], total[1]);
      load(i, ahead);
      ahead.advance(kOuterWarps, steps);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_of_four(total[half]);
    if (lane % 4 == 0) partial[warp][half * 8 + lane / 4] = sum;
  }
  __syncthreads();
  if (!writes) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOuterWarps; ++i) sum += partial[i][threadIdx.x];
  mixed[to] = added + sum;
}

QuantizedStack stack_of(const mythos_cuda_experts& e, const void* values, const void* scales, int columns) {
  return quantized_stack(values, scales, e.dtype, e.scale_dtype, e.block, columns);
}

template <typename Q, typename S, bool kAligned, int kTokens>
cudaError_t launch_inner(const mythos_cuda_experts& e, const Sizes& n, __nv_bfloat16* inner, cudaStream_t stream) {
  const int columns = int(pairs(e)) + e.shared * ceil_div(e.tokens, kTokens), tiles = ceil_div(e.expert_dim, kTileRows);
  const int most_tiles = std::min(ceil_div(tiles * columns, kInnerBlocks), std::min(tiles, kMostTiles));
  const Inputs in{e.normed, e.norm, e.epsilon, e.chosen, inner};
  const int bytes = RowTilesMemory(e.dim, most_tiles, kInnerWarps, kTokens, 2).bytes(kTokens);
  return launch_kernel(inner_quantized<Q, S, kAligned, kTokens>, dim3(columns, ceil_div(tiles, most_tiles)), kInnerThreads, bytes, stream, n, in,
                       stack_of(e, e.gate_up_routed, e.gate_up_routed_scales, e.dim),
                       stack_of(e, e.gate_up_shared, e.gate_up_shared_scales, e.dim), most_tiles);
}

template <typename Q, typename S>
cudaError_t launch_inner(const mythos_cuda_experts& e, const Sizes& n, __nv_bfloat16* inner, cudaStream_t stream) {
  if (row_bytes(e.dtype, e.dim) % 16 != 0) return launch_inner<Q, S, false, 1>(e, n, inner, stream);
  // As many at a time as shared memory holds on every GPU.
  const auto fits = [&](int tokens) { return RowTilesMemory(e.dim, kMostTiles, kInnerWarps, tokens, 2).bytes(tokens) <= kSharedBytes; };
  if (e.tokens >= 3 && fits(4)) return launch_inner<Q, S, true, 4>(e, n, inner, stream);
  if (e.tokens >= 2 && fits(2)) return launch_inner<Q, S, true, 2>(e, n, inner, stream);
  return launch_inner<Q, S, true, 1>(e, n, inner, stream);
}

template <typename Q, typename S, bool kAligned>
cudaError_t launch_outer(const mythos_cuda_experts& e, const Sizes& n, const __nv_bfloat16* inner, cudaStream_t stream) {
  const int bytes = (e.shared + e.top_k) * int(sizeof(Slot));
  return launch_kernel(outer_quantized<Q, S, kAligned>, dim3(e.tokens, ceil_div(e.dim, kTileRows)), kOuterThreads, bytes, stream, n, e.chosen,
                       e.weight, stack_of(e, e.down_routed, e.down_routed_scales, e.expert_dim),
                       stack_of(e, e.down_shared, e.down_shared_scales, e.expert_dim), inner, e.residual, e.mixed);
}

template <typename Q, typename S>
cudaError_t launch(const mythos_cuda_experts& e, __nv_bfloat16* inner, cudaStream_t stream) {
  const Sizes n = sizes_of(e);
  const cudaError_t error = launch_inner<Q, S>(e, n, inner, stream);
  if (error != cudaSuccess) return error;
  return row_bytes(e.dtype, e.expert_dim) % 16 == 0 ? launch_outer<Q, S, true>(e, n, inner, stream)
                                                    : launch_outer<Q, S, false>(e, n, inner, stream);
}

__nv_bfloat16* place(const mythos_cuda_experts& e, Arena& arena) {
  return arena.take<__nv_bfloat16>(inner_rows(e) * 2 * plane_of(e.expert_dim));
}

}  // namespace

uint64_t few_quantized_workspace(const mythos_cuda_experts& e) {
  Arena arena(nullptr);
  place(e, arena);
  return arena.used();
}

cudaError_t launch_few_quantized(const mythos_cuda_experts& e, cudaStream_t stream) {
  Arena arena(e.workspace);
  __nv_bfloat16* inner = place(e, arena);
  return with_storage(e.dtype, [&](auto storage) {
    using Q = decltype(storage);
    return e.scale_dtype == MYTHOS_CUDA_FLOAT16 ? launch<Q, __half>(e, inner, stream) : launch<Q, float>(e, inner, stream);
  });
}

}  // namespace mythos::cuda
