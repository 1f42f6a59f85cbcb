// Products of few tokens with a matrix of floating-point numbers. Shape letters: T tokens, I inputs, O outputs.
#include "experts.cuh"
#include "launch.cuh"
#include "linear.cuh"
#include "rows.cuh"

namespace mythos::cuda {
namespace {

constexpr int kHeld = 8;            // pieces of a row that a lane holds at the same time
constexpr int kWantedBlocks = 132;  // for a large GPU to be busy
constexpr int kMostBlocks = 528;    // that one holds at the same time

// Blocks: (kTokens tokens, `turns` times kRowWarps / split rows); split warps share a row out among themselves. The matrix does not
// change: its first rows are read before the tokens are there.
template <typename W, int kTokens, int kPiece>
__global__ void __launch_bounds__(kRowThreads) multiply_rows(Linear a, const W* weight, int split, int turns) {
  extern __shared__ float4 memory[];
  __shared__ float partial[kRowWarps][kTokens];
  constexpr int kStep = 32 * kPiece;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = warp & (split - 1), stride = split * kStep;
  const int first_k = share * kStep + lane * kPiece;
  int output = (blockIdx.y * turns * kRowWarps + warp) / split, k0 = first_k;  // split is a power of two
  const int end = min(output + turns * kRowWarps / split, a.outputs), rows = kRowWarps / split;
  Piece<W, kPiece> held[kHeld];
  const auto load = [&] {
    const W* row = weight + int64_t(min(output, a.outputs - 1)) * a.inputs;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (k0 + i * stride < a.inputs) held[i].load_kept(row + k0 + i * stride);
  };
  load();
  wait_for_previous();
  const int first = blockIdx.x * kTokens, count = min(kTokens, a.tokens - first);
  const auto added_then = [&] { return share == 0 && lane < count && output < end ? a.added(first + lane, output) : 0.0f; };
  float added = added_then();  // of token `lane`; there when the sum is
  const SharedTokens<kTokens, kPiece> x(memory, a.inputs);
  x.fill(a.x + int64_t(first) * a.inputs, count, a.norm);
  __syncthreads();
  float sum[kTokens] = {};
#pragma unroll 1
  for (int turn = 0; turn < turns;) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (k0 + i * stride >= a.inputs) break;
      float w[kPiece], values[kPiece];
      held[i].unpack(w);
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        x(token, k0 + i * stride, values);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) sum[token] = fmaf(w[j], values[j], sum[token]);
      }
    }
    const int finished = output;
    k0 += kHeld * stride;
    const bool ends = k0 - lane * kPiece - share * kStep >= a.inputs;  // the same for all warps
    if (ends) k0 = first_k, output += rows, ++turn;
    if (turn < turns) load();
    if (!ends) continue;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const float total = sum_of_warp(sum[token]);
      sum[token] = 0.0f;
      if (lane != token) continue;
      if (split > 1) partial[warp][token] = total;
      else if (token < count && finished < end) a.store(first + token, finished, added + total * x.factor(token, a.norm, a.epsilon));
    }
    if (split > 1) {
      __syncthreads();
      if (share == 0 && lane < count && finished < end) {
        float total = 0.0f;
#pragma unroll 1
        for (int i = 0; i < split; ++i) total += partial[warp + i][lane];
        a.store(first + lane, finished, added + total * x.factor(lane, a.norm, a.epsilon));
      }
      __syncthreads();
    }
    if (turn < turns) added = added_then();
  }
}

template <typename W, int kTokens>
cudaError_t launch(const mythos_cuda_linear& a, cudaStream_t stream) {
  return with_piece(a.inputs, [&](auto piece) {
    const int tokens = ceil_div(a.tokens, kTokens), steps = ceil_div(a.inputs, 32 * piece());
    int split = 1;
    while (split < kRowWarps && 2 * split <= steps && tokens * ceil_div(a.outputs * split, kRowWarps) < kWantedBlocks) split *= 2;
    const int blocks = ceil_div(a.outputs * split, kRowWarps), turns = ceil_div(tokens * blocks, kMostBlocks);
    return launch_kernel(multiply_rows<W, kTokens, piece()>, dim3(tokens, ceil_div(blocks, turns)), kRowThreads,
                         SharedTokens<kTokens, 8>::bytes(a.inputs), stream, sizes_of(a), static_cast<const W*>(a.weight), split, turns);
  });
}

}  // namespace

template <typename W>
cudaError_t launch_few(const mythos_cuda_linear& a, cudaStream_t stream) {
  // As many tokens at a time as every GPU has room for.
  if (a.tokens >= 4 && SharedTokens<4, 8>::bytes(a.inputs) <= kFewSharedBytes) return launch<W, 4>(a, stream);
  if (a.tokens >= 2 && SharedTokens<2, 8>::bytes(a.inputs) <= kFewSharedBytes) return launch<W, 2>(a, stream);
  return launch<W, 1>(a, stream);
}

template cudaError_t launch_few<float>(const mythos_cuda_linear&, cudaStream_t);
template cudaError_t launch_few<__half>(const mythos_cuda_linear&, cudaStream_t);
template cudaError_t launch_few<__nv_bfloat16>(const mythos_cuda_linear&, cudaStream_t);

}  // namespace mythos::cuda
