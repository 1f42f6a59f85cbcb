// Products of few tokens with a quantized matrix. Shape letters: T tokens, I inputs, O outputs.
#include <algorithm>

#include "experts.cuh"
#include "launch.cuh"
#include "linear.cuh"
#include "quantized_rows.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWantedBlocks = 264;  // for any GPU to be busy, and none of today's to begin a second round
constexpr int kMostTiles = 16;      // of a block
constexpr int kSharedBytes = 96 * 1024;

// Blocks: (kTokens tokens, most_tiles tiles of rows).
template <typename Q, typename S, bool kAligned, int kTokens>
__global__ void __launch_bounds__(kThreads, 2) linear_quantized(Linear a, QuantizedStack weight, int most_tiles) {
  extern __shared__ uint4 memory[];
  __shared__ float squares[kTokens * kWarps];
  const int first = blockIdx.x * kTokens, count = min(kTokens, a.tokens - first);
  const int o0 = blockIdx.y * most_tiles * kTileRows, rows = a.outputs - o0, tiles = min(most_tiles, (rows + kTileRows - 1) / kTileRows);
  const RowTilesMemory sizes(a.inputs, most_tiles, kWarps, kTokens, 1);
  auto* planes = reinterpret_cast<__nv_bfloat16*>(memory);
  uint4* zeros = memory + sizes.planes_bytes(kTokens) / 16;
  float* partial = reinterpret_cast<float*>(zeros + 4);
  RowTiles<Q, S, kAligned, 1, kWarps> product(weight, o0, rows, 0, tiles);
  product.begin();
  clear<kThreads>(zeros, partial, sizes.partial);
  wait_for_previous();
  Turn at(threadIdx.x, tiles * kTileRows);
  const auto added_then = [&] { return at.token < count && at.row < rows ? a.added(first + at.token, o0 + at.row) : 0.0f; };
  float added = added_then();  // there when the sums are
  fill_planes<kThreads>(planes, a.x + int64_t(first) * a.inputs, count, a.inputs, a.norm, squares);
  __syncthreads();
  product.template run<kTokens>(SharedPlanes<Q>(planes, zeros, sizes.plane), partial);
  __syncthreads();
#pragma unroll 1
  for (; at.token < count; at.move(kThreads), added = added_then()) {
    const int token = at.token, row = at.row;
    if (row >= rows) continue;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      sum += partial[((row / kTileRows * kWarps + warp) * kTokens + token) * kTileRows + row % kTileRows];
    a.store(first + token, o0 + row, added + sum * factor_of<kWarps>(squares, token, a.inputs, a.norm, a.epsilon));
  }
}

template <typename Q, typename S, bool kAligned, int kTokens>
cudaError_t launch(const mythos_cuda_linear& a, cudaStream_t stream) {
  const int tokens = ceil_div(a.tokens, kTokens), tiles = ceil_div(a.outputs, kTileRows);
  const int most_tiles = std::min(ceil_div(tiles * tokens, kWantedBlocks), std::min(tiles, kMostTiles));
  const int bytes = RowTilesMemory(a.inputs, most_tiles, kWarps, kTokens, 1).bytes(kTokens);
  const auto stack = quantized_stack(a.weight, a.scales, a.dtype, a.scale_dtype, a.block, a.inputs);
  return launch_kernel(linear_quantized<Q, S, kAligned, kTokens>, dim3(tokens, ceil_div(tiles, most_tiles)), kThreads, bytes, stream,
                       sizes_of(a), stack, most_tiles);
}

template <typename Q, typename S>
cudaError_t launch(const mythos_cuda_linear& a, cudaStream_t stream) {
  if (row_bytes(a.dtype, a.inputs) % 16 != 0) return launch<Q, S, false, 1>(a, stream);
  // As many at a time as shared memory holds on every GPU.
  const auto fits = [&](int tokens) { return RowTilesMemory(a.inputs, kMostTiles, kWarps, tokens, 1).bytes(tokens) <= kSharedBytes; };
  if (a.tokens >= 3 && fits(4)) return launch<Q, S, true, 4>(a, stream);
  return a.tokens >= 2 && fits(2) ? launch<Q, S, true, 2>(a, stream) : launch<Q, S, true, 1>(a, stream);
}

}  // namespace

cudaError_t launch_few_quantized(const mythos_cuda_linear& a, cudaStream_t stream) {
  return with_storage(a.dtype, [&](auto storage) {
    using Q = decltype(storage);
    return a.scale_dtype == MYTHOS_CUDA_FLOAT16 ? launch<Q, __half>(a, stream) : launch<Q, float>(a, stream);
  });
}

}  // namespace mythos::cuda
