// Tokens as tensor cores take them: normalized where they are to be, and rounded to the dtype of what they are multiplied with.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"
#include "numbers.cuh"

namespace mythos::cuda {

constexpr int kRoundingThreads = 256;

// A block a token. norm: [width], or null.
template <typename W>
__global__ void __launch_bounds__(kRoundingThreads) round_each(const float* from, const float* norm, float epsilon, int width, W* to) {
  __shared__ float scratch[kRoundingThreads / 32];
  const int64_t row = int64_t(blockIdx.x) * width;
  wait_for_previous();
  float factor = 1.0f;
  if (norm != nullptr) {
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += kRoundingThreads) squares = fmaf(from[row + i], from[row + i], squares);
    factor = inverse_rms(sum_of_block<kRoundingThreads / 32>(squares, scratch), width, epsilon);
  }
  for (int i = threadIdx.x; i < width; i += kRoundingThreads) to[row + i] = from_float<W>(from[row + i] * (norm != nullptr ? factor * norm[i] : 1.0f));
}

// [tokens, width]
template <typename W>
cudaError_t round_tokens(const float* from, const float* norm, float epsilon, int tokens, int width, W* to, cudaStream_t stream) {
  return launch_kernel(round_each<W>, tokens, kRoundingThreads, 0, stream, from, norm, epsilon, width, to);
}

}  // namespace mythos::cuda
