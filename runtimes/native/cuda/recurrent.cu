// What stands around the looped layers, a block a token at a time: signal and norm before, LoRA, injection and halting after, and of
// the next loop's signal and norm at once where they are wanted.
//
// Shape letters: T tokens, D dim, r lora_rank.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "mythos_cuda.h"
#include "numbers.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kRanks = 8;         // of the LoRA at a time
constexpr int kMostPieces = 4;    // of kThreads channels: up to so many constants wait in registers
constexpr int kAnyPieces = 16;    // D is at most kThreads times this
constexpr int kMostBlocks = 1056;  // of tokens, which take turns: constants are read once a block

// A thread's numbers of [D] as kPieces, every kThreads-th from its own on; 0 behind the last.
template <int kPieces>
struct Channels {
  float at[kPieces];

  __device__ __forceinline__ void load(const float* from, int dim) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int i = threadIdx.x + piece * kThreads;
      at[piece] = i < dim ? from[i] : 0.0f;
    }
  }
  __device__ __forceinline__ void store(float* to, int dim) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int i = threadIdx.x + piece * kThreads;
      if (i < dim) to[i] = at[piece];
    }
  }
};

template <int kPieces>
__global__ void __launch_bounds__(kThreads) recurrent_input(mythos_cuda_recurrent_input a) {
  __shared__ float scratch[kWarps];
  Channels<kPieces> sum, e, signal, norm;
  signal.load(a.loop_signal, a.dim), norm.load(a.norm, a.dim);
  wait_for_previous();
#pragma unroll 1
  for (int token = blockIdx.x; token < a.tokens; token += gridDim.x) {
    const int64_t row = int64_t(token) * a.dim;
    sum.load(a.h + row, a.dim), e.load(a.e + row, a.dim);
    float squares = 0.0f;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      sum.at[piece] += signal.at[piece] + e.at[piece];
      squares = fmaf(sum.at[piece], sum.at[piece], squares);
    }
    const float factor = inverse_rms(sum_of_block<kWarps>(squares, scratch), a.dim, a.epsilon);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) sum.at[piece] *= factor * norm.at[piece];
    sum.store(a.y + row, a.dim);
    if (a.result == nullptr) continue;
    Channels<kPieces>{}.store(a.result + row, a.dim);
    if (threadIdx.x == 0) a.halted_mass[token] = 0.0f, a.exit_loop[token] = 0;
  }
}

// kRows rows of a matrix, from `first` on: in registers before they are needed, where they fit, else read when they are.
template <int kPieces, int kRows>
struct Rows {
  static constexpr bool kHeld = kPieces <= kMostPieces;
  Channels<kHeld ? kPieces : 1> rows[kHeld ? kRows : 1];
  const float* matrix;
  int dim, count;

  __device__ __forceinline__ Rows(const float* from, int first, int all, int width)
      : matrix(from + int64_t(first) * width), dim(width), count(all - first) {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) rows[i].load(matrix + int64_t(i) * dim, i < count ? dim : 0);
    }
  }
  __device__ __forceinline__ float at(int row, int piece) const {
    if constexpr (kHeld) return rows[row].at[piece];
    const int i = threadIdx.x + piece * kThreads;
    return row < count && i < dim ? matrix[int64_t(row) * dim + i] : 0.0f;
  }
};

// Two sums at a time; every thread gets them. scratch: of kWarps pairs in shared memory.
__device__ __forceinline__ float2 sums_of_block(float2 values, float2* scratch) {
  values = {sum_of_warp(values.x), sum_of_warp(values.y)};
  __syncthreads();  // scratch may still be read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = values;
  __syncthreads();
  float2 total = {};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total.x += scratch[warp].x, total.y += scratch[warp].y;
  return total;
}

template <int kPieces>
__global__ void __launch_bounds__(kThreads) recurrent_update(mythos_cuda_recurrent_update a) {
  __shared__ float partial[kWarps][kRanks];
  __shared__ float2 scratch[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Channels<kPieces> decay, injection, halt, next, h, e, result;
  Rows<kPieces, kRanks> down(a.lora_down, 0, a.lora_rank, a.dim), up(a.lora_up, 0, a.lora_rank, a.dim);
  Rows<kPieces, 1> signal(a.loop_signal, 0, a.y != nullptr, a.dim), norm(a.norm, 0, a.y != nullptr, a.dim);
  decay.load(a.decay, a.dim), injection.load(a.injection, a.dim), halt.load(a.halt, a.dim);
  const auto scale_from = [&](int first) { return first + lane / 4 < a.lora_rank ? a.lora_scale[first + lane / 4] : 0.0f; };
  int held = 0;                 // first of the ranks whose rows are held
  float scale = scale_from(0);  // of rank lane / 4 of those
  wait_for_previous();
#pragma unroll 1
  for (int token = blockIdx.x; token < a.batch * a.seq; token += gridDim.x) {
    const int64_t row = int64_t(token) * a.dim;
    next.load(a.x + row, a.dim), h.load(a.h + row, a.dim), e.load(a.e + row, a.dim), result.load(a.result + row, a.dim);
    Channels<kPieces> lora = {};
#pragma unroll 1
    for (int first = 0; first < a.lora_rank; first += kRanks) {
      if (first != held) {
        down = Rows<kPieces, kRanks>(a.lora_down, first, a.lora_rank, a.dim);
        up = Rows<kPieces, kRanks>(a.lora_up, first, a.lora_rank, a.dim);
        held = first, scale = scale_from(first);
        __syncthreads();  // partial may still be read
      }
      float sums[kRanks] = {};
#pragma unroll
      for (int i = 0; i < kRanks; ++i)
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) sums[i] = fmaf(down.at(i, piece), next.at[piece], sums[i]);
      const float of_warp = sums_of_warp(sums);
      if (lane % 4 == 0) partial[warp][lane / 4] = of_warp;
      __syncthreads();
      float low_of_lane = 0.0f;  // of rank lane / 4
#pragma unroll
      for (int w = 0; w < kWarps; w += 4) low_of_lane += partial[w + lane % 4][lane / 4];
#pragma unroll
      for (int distance = 2; distance > 0; distance /= 2) low_of_lane += __shfl_xor_sync(0xffffffffu, low_of_lane, distance);
      low_of_lane *= scale;
#pragma unroll
      for (int i = 0; i < kRanks; ++i) {
        const float low = __shfl_sync(0xffffffffu, low_of_lane, 4 * i);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) lora.at[piece] = fmaf(low, up.at(i, piece), lora.at[piece]);
      }
    }
    // Asked for together, and before they are needed.
    const float halted = a.halted_mass[token];
    const int64_t exit_loop = a.exit_loop[token], n_loops = a.n_loops[a.n_loops_per_row ? token / a.seq : 0];
    float2 sums = {};  // of the logit, and of the squares of what y is the norm of, which e becomes
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      next.at[piece] = decay.at[piece] * h.at[piece] + injection.at[piece] * e.at[piece] + (next.at[piece] + lora.at[piece]);
      e.at[piece] = next.at[piece] + (signal.at(0, piece) + e.at[piece]);
      sums = {fmaf(next.at[piece], halt.at[piece], sums.x), fmaf(e.at[piece], e.at[piece], sums.y)};
    }
    sums = sums_of_block(sums, scratch);
    if (a.y != nullptr) {
      const float factor = inverse_rms(sums.y, a.dim, a.epsilon);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) e.at[piece] *= factor * norm.at(0, piece);
      e.store(a.y + row, a.dim);
    }
    const bool running = (halted < a.act_threshold) & (a.loop < n_loops);
    const float probability = __fdividef(1.0f, 1.0f + expf(-(sums.x + a.halt_bias))), mass = halted + probability;
    const float weight = mass >= a.act_threshold ? fmaxf(1.0f - halted, 0.0f) : probability;
    next.store(a.next_h + row, a.dim);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
      if (running) result.at[piece] += weight * next.at[piece];
    result.store(a.next_result + row, a.dim);
    if (threadIdx.x == 0) {
      a.next_halted_mass[token] = running ? mass : halted;
      a.next_exit_loop[token] = exit_loop + running;
    }
  }
}

// Calls a function with the least power of two of pieces that hold D, a constant.
template <typename Function>
cudaError_t with_pieces(int dim, const Function& function) {
  if (dim <= kThreads) return function(std::integral_constant<int, 1>());
  if (dim <= 2 * kThreads) return function(std::integral_constant<int, 2>());
  if (dim <= 4 * kThreads) return function(std::integral_constant<int, 4>());
  if (dim <= 8 * kThreads) return function(std::integral_constant<int, 8>());
  return function(std::integral_constant<int, kAnyPieces>());
}

}  // namespace
}  // namespace mythos::cuda

using namespace mythos::cuda;

extern "C" {

__attribute__((visibility("default"))) int32_t mythos_cuda_recurrent_input_launch(const mythos_cuda_recurrent_input* a, void* stream) {
  if (a == nullptr || a->size < sizeof(*a) || a->tokens < 0 || a->dim <= 0 || a->dim > kAnyPieces * kThreads) return cudaErrorInvalidValue;
  if ((a->result != nullptr) != (a->halted_mass != nullptr) || (a->result != nullptr) != (a->exit_loop != nullptr)) return cudaErrorInvalidValue;
  if (a->tokens == 0) return cudaSuccess;
  return with_pieces(a->dim, [&](auto pieces) {
    return launch_kernel(recurrent_input<pieces()>, std::min(a->tokens, kMostBlocks), kThreads, 0, static_cast<cudaStream_t>(stream), *a);
  });
}

__attribute__((visibility("default"))) int32_t mythos_cuda_recurrent_update_launch(const mythos_cuda_recurrent_update* a, void* stream) {
  const bool valid = a != nullptr && a->size >= sizeof(*a) && a->batch >= 0 && a->seq >= 0 && a->dim > 0 && a->lora_rank >= 0;
  if (!valid || a->dim > kAnyPieces * kThreads) return cudaErrorInvalidValue;
  if (a->y != nullptr && (a->loop_signal == nullptr || a->norm == nullptr)) return cudaErrorInvalidValue;
  if (a->batch == 0 || a->seq == 0) return cudaSuccess;
  return with_pieces(a->dim, [&](auto pieces) {
    return launch_kernel(recurrent_update<pieces()>, std::min(a->batch * a->seq, kMostBlocks), kThreads, 0, static_cast<cudaStream_t>(stream), *a);
  });
}

}  // extern "C"
