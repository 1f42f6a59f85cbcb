// Several numbers at a time, of any dtype, as float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace mythos::cuda {

template <typename W>
__device__ __forceinline__ float to_float(W value) {
  return static_cast<float>(value);
}

template <typename W>
__device__ __forceinline__ W from_float(float value) {
  return static_cast<W>(value);
}

// Two numbers of a register, lower first.
__device__ __forceinline__ float2 widen(uint32_t bits, const __half*) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
__device__ __forceinline__ float2 widen(uint32_t bits, const __nv_bfloat16*) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
}

// kCount neighbours as they lie in memory, widened when they are needed: loads of several pieces run at the same time. Pieces of 8
// and 2 are aligned to their size (of float32, to 16 and 8 bytes). load: of what is not read again soon; load_kept: of what may be.
template <typename W, int kCount>
struct Piece;

template <typename W>
struct Piece<W, 1> {
  W value;
  __device__ __forceinline__ void load(const W* from) { value = *from; }
  __device__ __forceinline__ void load_kept(const W* from) { load(from); }
  __device__ __forceinline__ void unpack(float (&to)[1]) const { to[0] = to_float(value); }
};

template <typename W>
struct Piece<W, 2> {
  uint32_t bits;
  __device__ __forceinline__ void load(const W* from) { bits = __ldcs(reinterpret_cast<const uint32_t*>(from)); }
  __device__ __forceinline__ void load_kept(const W* from) { bits = __ldg(reinterpret_cast<const uint32_t*>(from)); }
  __device__ __forceinline__ void unpack(float (&to)[2]) const {
    const float2 pair = widen(bits, static_cast<const W*>(nullptr));
    to[0] = pair.x, to[1] = pair.y;
  }
};

template <typename W>
struct Piece<W, 8> {
  uint4 bits;
  __device__ __forceinline__ void load(const W* from) { bits = __ldcs(reinterpret_cast<const uint4*>(from)); }
  __device__ __forceinline__ void load_kept(const W* from) { bits = __ldg(reinterpret_cast<const uint4*>(from)); }
  __device__ __forceinline__ void unpack(float (&to)[8]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen(words[i], static_cast<const W*>(nullptr));
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct Piece<float, 2> {
  float2 bits;
  __device__ __forceinline__ void load(const float* from) { bits = __ldcs(reinterpret_cast<const float2*>(from)); }
  __device__ __forceinline__ void load_kept(const float* from) { bits = __ldg(reinterpret_cast<const float2*>(from)); }
  __device__ __forceinline__ void unpack(float (&to)[2]) const { to[0] = bits.x, to[1] = bits.y; }
};

template <>
struct Piece<float, 8> {
  float4 low, high;
  __device__ __forceinline__ void load(const float* from) {
    low = __ldcs(reinterpret_cast<const float4*>(from));
    high = __ldcs(reinterpret_cast<const float4*>(from) + 1);
  }
  __device__ __forceinline__ void load_kept(const float* from) {
    low = __ldg(reinterpret_cast<const float4*>(from));
    high = __ldg(reinterpret_cast<const float4*>(from) + 1);
  }
  __device__ __forceinline__ void unpack(float (&to)[8]) const {
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }
};

// Calls a function with the largest piece that rows of so many numbers consist of, a constant.
template <typename Function>
auto with_piece(int width, const Function& function) {
  if (width % 8 == 0) return function(std::integral_constant<int, 8>());
  return width % 2 == 0 ? function(std::integral_constant<int, 2>()) : function(std::integral_constant<int, 1>());
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Of kCount values at a time, two to sixteen: lanes from 32 / kCount i on get the sum of values[i].
template <int kCount>
__device__ __forceinline__ float sums_of_warp(float (&values)[kCount]) {
  constexpr int kLanes = 32 / kCount;
#pragma unroll
  for (int count = kCount / 2; count > 0; count /= 2) {
    const int distance = kLanes * count;
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float sent = upper ? values[i] : values[i + count], kept = upper ? values[i + count] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, distance);
    }
  }
  float sum = values[0];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// The same for a whole block of kWarps warps; every thread gets it. scratch: of kWarps numbers in shared memory.
template <int kWarps>
__device__ __forceinline__ float sum_of_block(float value, float* scratch) {
  value = sum_of_warp(value);
  __syncthreads();  // scratch may still be read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp];
  return total;
}

// The largest of a block's values likewise.
template <int kWarps>
__device__ __forceinline__ float most_of_block(float value, float* scratch) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  __syncthreads();  // scratch may still be read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) value = fmaxf(value, scratch[warp]);
  return value;
}

// __fdividef: a few instructions where a division takes a hundred, and each launch reads its code anew.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// 1 / rms of `width` numbers, of their sum of squares (arXiv 1910.07467).
__device__ __forceinline__ float inverse_rms(float squares, int width, float epsilon) {
  return rsqrtf(__fdividef(squares, float(width)) + epsilon);
}

// What sums of products with a token of `width` numbers are to be multiplied with: 1 / rms where there is a norm. squares: [tokens, kWarps],
// of each warp's share.
template <int kWarps>
__device__ __forceinline__ float factor_of(const float* squares, int token, int width, const float* norm, float epsilon) {
  if (norm == nullptr) return 1.0f;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += squares[token * kWarps + warp];
  return inverse_rms(sum, width, epsilon);
}

}  // namespace mythos::cuda
