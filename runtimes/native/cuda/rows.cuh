// Products with few tokens: the time is that of reading the matrix once, so a warp reads whole rows, and tokens wait in shared memory.
#pragma once

#include "numbers.cuh"

namespace mythos::cuda {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

// Adds, for every row and token, a lane's part of the sum of row[k] * x[k] for k from first to last. kPiece: what rows, first and last
// consist of whole ones of. read(token, k, x): kPiece numbers of a token.
template <typename W, int kRows, int kTokens, int kPiece, typename Read>
__device__ __forceinline__ void add_products(const W* const (&rows)[kRows], int first, int last, const Read& read,
                                             float (&sum)[kRows][kTokens]) {
  constexpr int kStep = 32 * kPiece;
  constexpr int kAhead = 4;  // steps whose loads run at the same time
  const auto multiply = [&](const Piece<W, kPiece> (&loaded)[kRows], int k) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      float x[kPiece];
      read(token, k, x);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float w[kPiece];
        loaded[row].unpack(w);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) sum[row][token] = fmaf(w[i], x[i], sum[row][token]);
      }
    }
  };
  int k = first + threadIdx.x % 32 * kPiece;
#pragma unroll 2
  for (; k + (kAhead - 1) * kStep < last; k += kAhead * kStep) {
    Piece<W, kPiece> loaded[kAhead][kRows];
#pragma unroll
    for (int step = 0; step < kAhead; ++step)
#pragma unroll
      for (int row = 0; row < kRows; ++row) loaded[step][row].load(rows[row] + k + step * kStep);
#pragma unroll
    for (int step = 0; step < kAhead; ++step) multiply(loaded[step], k + step * kStep);
  }
#pragma unroll 1
  for (; k < last; k += kStep) {
    Piece<W, kPiece> loaded[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) loaded[row].load(rows[row] + k);
    multiply(loaded, k);
  }
}

// kTokens tokens in shared memory, times their norm's weight where there is one (arXiv 1910.07467). For pieces of eight, each lies as its
// numbers 0 to 3 of every eight, then 4 to 7: lanes read without conflicts.
template <int kTokens, int kPiece>
class SharedTokens {
 public:
  // memory: bytes() of it.
  __device__ __forceinline__ SharedTokens(void* memory, int width)
      : values_(static_cast<float*>(memory)), squares_(values_ + kTokens * pitch_of(width)), width_(width), pitch_(pitch_of(width)) {}

  static __host__ __device__ __forceinline__ int pitch_of(int width) { return (width + 7) / 8 * 8; }
  static size_t bytes(int width) { return (kTokens * pitch_of(width) + kTokens * kRowWarps) * sizeof(float); }

  // Copies `count` tokens [count, width]; to be followed by a __syncthreads().
  __device__ __forceinline__ void fill(const float* from, int count, const float* norm) const {
#pragma unroll 1
    for (int token = 0; token < count; ++token) {
      const float* row = from + int64_t(token) * width_;
      const float squares = sum_of_warp(width_ % 4 == 0 ? copy_fours(row, token, norm) : copy_ones(row, token, norm));
      if (threadIdx.x % 32 == 0) squares_[token * kRowWarps + threadIdx.x / 32] = squares;
    }
  }

  __device__ __forceinline__ float factor(int token, const float* norm, float epsilon) const {
    return factor_of<kRowWarps>(squares_, token, width_, norm, epsilon);
  }

  __device__ __forceinline__ void operator()(int token, int k, float (&x)[kPiece]) const {
    const float* row = values_ + token * pitch_;
    if constexpr (kPiece == 8) {
      const float4 low = *reinterpret_cast<const float4*>(row + k / 2);
      const float4 high = *reinterpret_cast<const float4*>(row + pitch_ / 2 + k / 2);
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[i] = row[k + i];
    }
  }

 private:
  // A thread's sum of squares. Loads of several fours run at the same time.
  __device__ __forceinline__ float copy_fours(const float* from, int token, const float* norm) const {
    constexpr int kFours = 4;
    const auto* row = reinterpret_cast<const float4*>(from);
    const auto* scales = reinterpret_cast<const float4*>(norm);
    float squares = 0.0f;
#pragma unroll 1
    for (int first = threadIdx.x; first < width_ / 4; first += kFours * kRowThreads) {
      float4 x[kFours], scale[kFours];
#pragma unroll
      for (int i = 0; i < kFours; ++i)
        if (first + i * kRowThreads < width_ / 4) {
          x[i] = row[first + i * kRowThreads];
          if (norm != nullptr) scale[i] = scales[first + i * kRowThreads];
        }
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const int at = first + i * kRowThreads;
        if (at >= width_ / 4) break;
        if (norm != nullptr) {
          squares += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
          x[i].x *= scale[i].x, x[i].y *= scale[i].y, x[i].z *= scale[i].z, x[i].w *= scale[i].w;
        }
        float* to = values_ + token * pitch_ + (kPiece == 8 ? at % 2 * (pitch_ / 2) + at / 2 * 4 : at * 4);
        *reinterpret_cast<float4*>(to) = x[i];
      }
    }
    return squares;
  }
  // kPiece is 1 or 2 here.
  __device__ __forceinline__ float copy_ones(const float* row, int token, const float* norm) const {
    float squares = 0.0f;
#pragma unroll 1
    for (int k = threadIdx.x; k < width_; k += kRowThreads) {
      const float x = row[k];
      squares = fmaf(x, x, squares);
      values_[token * pitch_ + k] = norm != nullptr ? x * norm[k] : x;
    }
    return squares;
  }

  float *values_, *squares_;
  int width_, pitch_;
};

// A token in device memory, float32.
template <int kPiece>
struct GlobalToken {
  const float* values;

  __device__ __forceinline__ void operator()(int, int k, float (&x)[kPiece]) const {
    if constexpr (kPiece == 8) {
      const float4 low = *reinterpret_cast<const float4*>(values + k), high = *reinterpret_cast<const float4*>(values + k + 4);
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[i] = values[k + i];
    }
  }
};

}  // namespace mythos::cuda
