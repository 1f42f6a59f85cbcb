// Products of many tokens with a matrix a head, on tensor cores.
#pragma once

#include "experts.cuh"
#include "launch.cuh"
#include "tiles.cuh"

namespace mythos::cuda {

// y[t, h] = weight[h] . x[t, h]: x [T, H, I], weight [H, O, I], y [T, H, pitch], of which the first O are written.
struct HeadSizes {
  int tokens, heads, inputs, outputs, pitch;
};

template <typename W>
struct HeadTokens {
  const W* values;
  int first, count, columns;
  int64_t row_pitch;

  __device__ __forceinline__ const W* any() const { return values; }
  __device__ __forceinline__ int64_t jump() const { return 0; }
  __device__ __forceinline__ int width() const { return columns; }
  __device__ __forceinline__ const W* operator()(int row) const {
    return first + row < count ? values + (first + row) * row_pitch : nullptr;
  }
};

template <typename W>
struct HeadRows {
  const W* stack;
  int first, count;

  __device__ __forceinline__ int64_t jump() const { return 0; }
  __device__ __forceinline__ int64_t operator()(int row) const { return first + row < count ? first + row : -1; }
};

// Blocks: (kN outputs, kM tokens, H).
template <typename W, typename Out, int kM, int kN, int kWarpsM>
__global__ void __launch_bounds__(kTileThreads) head_products(HeadSizes n, const W* x, const W* weight, Out* y) {
  using Product = Tile<W, kM, kN, kWarpsM, 64, 2>;
  extern __shared__ __align__(16) unsigned char stages[];
  wait_for_previous();
  const int token0 = blockIdx.y * kM, output0 = blockIdx.x * kN, head = blockIdx.z, lane = threadIdx.x % 32;
  Product product;
  product.run(stages, 1,
              HeadTokens<W>{x + int64_t(head) * n.inputs, token0, n.tokens, n.inputs, int64_t(n.heads) * n.inputs},
              HeadRows<W>{weight + int64_t(head) * n.outputs * n.inputs, output0, n.outputs});
#pragma unroll
  for (int m = 0; m < Product::kMs; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = token0 + Product::first_row() + m * 16 + i / 2 * 8 + lane / 4;
      if (token >= n.tokens) continue;
#pragma unroll
      for (int piece = 0; piece < Product::kNs; ++piece) {
        const int output = output0 + Product::first_column() + piece * 8 + lane % 4 * 2 + i % 2;
        if (output < n.outputs) y[(int64_t(token) * n.heads + head) * n.pitch + output] = from_float<Out>(product.sum[m][piece][i]);
      }
    }
}

// I must be a multiple of eight.
template <typename W, typename Out>
cudaError_t multiply_heads(const HeadSizes& n, const W* x, const W* weight, Out* y, cudaStream_t stream) {
  constexpr int kM = 64, kN = 64, kBytes = Tile<W, kM, kN, 2, 64, 2>::kSharedBytes;
  const dim3 blocks(ceil_div(n.outputs, kN), ceil_div(n.tokens, kM), n.heads);
  return launch_kernel(head_products<W, Out, kM, kN, 2>, blocks, kTileThreads, kBytes, stream, n, x, weight, y);
}

}  // namespace mythos::cuda
