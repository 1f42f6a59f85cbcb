// What the ways of multiplying with one matrix share. Shape letters: T tokens, I inputs, O outputs.
#pragma once

#include <cuda_runtime.h>

#include "mythos_cuda.h"

namespace mythos::cuda {

// What kernels are told of a call.
struct Linear {
  int tokens, inputs, outputs;
  const float *x, *norm, *residual;
  float *y, *rest, epsilon;
  int split;  // outputs of y; those from here on go to rest

  // What a sum is added to. Where there is a residual, there is no split.
  __device__ __forceinline__ float added(int64_t token, int output) const {
    return residual != nullptr ? residual[token * outputs + output] : 0.0f;
  }
  __device__ __forceinline__ void store(int64_t token, int output, float value) const {
    if (output >= split) rest[token * (outputs - split) + output - split] = value;
    else y[token * split + output] = value;
  }
};

inline Linear sizes_of(const mythos_cuda_linear& a) {
  return {a.tokens, a.inputs, a.outputs, a.x, a.norm, a.residual, a.y, a.rest, a.epsilon, a.split > 0 ? a.split : a.outputs};
}

constexpr int kFewSharedBytes = 96 * 1024;  // that a block of every GPU can have

// Few tokens, or a matrix that tensor cores do not take.
template <typename W>
cudaError_t launch_few(const mythos_cuda_linear& linear, cudaStream_t stream);
// The same of a quantized matrix.
cudaError_t launch_few_quantized(const mythos_cuda_linear& linear, cudaStream_t stream);

}  // namespace mythos::cuda
