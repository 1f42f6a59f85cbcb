// Eight numbers at a time, of any dtype, as float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace mythos::cuda {

constexpr int kEight = 8;

template <typename W>
__device__ __forceinline__ float to_float(W value) {
  return static_cast<float>(value);
}

template <typename W>
__device__ __forceinline__ W from_float(float value) {
  return static_cast<W>(value);
}

// Two halves of a register, lower first.
__device__ __forceinline__ float2 widen(uint32_t bits, const __half*) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
__device__ __forceinline__ float2 widen(uint32_t bits, const __nv_bfloat16*) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
}

// Eight neighbours as they lie in memory, to be widened when they are needed: loads of several of them run at the same time.
template <typename W>
struct Eight {
  uint4 bits;

  __device__ __forceinline__ void load(const W* from) { bits = __ldcs(reinterpret_cast<const uint4*>(from)); }

  __device__ __forceinline__ void unpack(float (&to)[kEight]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen(words[i], static_cast<const W*>(nullptr));
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct Eight<float> {
  float4 low, high;

  __device__ __forceinline__ void load(const float* from) {
    low = __ldcs(reinterpret_cast<const float4*>(from));
    high = __ldcs(reinterpret_cast<const float4*>(from) + 1);
  }

  __device__ __forceinline__ void unpack(float (&to)[kEight]) const {
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }
};

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

}  // namespace mythos::cuda
