// Weights as bundles store them, rows with a scale for every block of neighbours: where they lie, and numbers out of their bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "mythos_cuda.h"

namespace mythos::cuda {

// How numbers are stored. Int4: two a byte, the first in the low half, in two's complement. Float8: e4m3fn (arXiv 2209.05433).
struct Int4 {};
struct Int8 {};
struct Float8 {};

template <typename Q>
inline constexpr bool kQuantized = std::is_empty_v<Q>;

template <typename Q>
inline constexpr int kInSixteen = std::is_same_v<Q, Int4> ? 32 : 16;  // numbers in 16 bytes

inline bool is_quantized(int dtype) { return dtype >= MYTHOS_CUDA_INT8 && dtype <= MYTHOS_CUDA_FLOAT8; }
inline int row_bytes(int dtype, int columns) { return dtype == MYTHOS_CUDA_INT4 ? columns / 2 : columns; }

// Whether a dtype, a block and the dtype of scales go together with rows of so many numbers.
inline bool is_valid_form(int dtype, int scale_dtype, int block, int columns) {
  if (!is_quantized(dtype)) return dtype >= MYTHOS_CUDA_FLOAT32 && dtype <= MYTHOS_CUDA_BFLOAT16;
  const bool scales = scale_dtype == MYTHOS_CUDA_FLOAT32 || scale_dtype == MYTHOS_CUDA_FLOAT16;
  return scales && (block == 32 || block == 64 || block == 128) && (dtype != MYTHOS_CUDA_INT4 || columns % 2 == 0);
}

// Calls a function with the storage type of a quantized dtype.
template <typename Function>
auto with_storage(int dtype, const Function& function) {
  if (dtype == MYTHOS_CUDA_INT4) return function(Int4());
  return dtype == MYTHOS_CUDA_INT8 ? function(Int8()) : function(Float8());
}

// Rows of any number of matrices, one after another.
struct QuantizedStack {
  const uint8_t* values;
  const void* scales;  // [rows, blocks], float16 or float32
  int row_bytes, blocks, block_shift;  // bytes and blocks of a row; a block is 1 << block_shift numbers
  int half_scales;

  __host__ __device__ __forceinline__ const uint8_t* row(int64_t index) const { return values + index * row_bytes; }
};

inline QuantizedStack quantized_stack(const void* values, const void* scales, int dtype, int scale_dtype, int block, int columns) {
  const int shift = block == 32 ? 5 : block == 64 ? 6 : 7;
  return {static_cast<const uint8_t*>(values), scales, row_bytes(dtype, columns), (columns + block - 1) / block, shift,
          scale_dtype == MYTHOS_CUDA_FLOAT16};
}

// (a & mask) ^ flip, in one instruction.
__device__ __forceinline__ uint32_t mask_flip(uint32_t a, uint32_t mask, uint32_t flip) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(a), "r"(mask), "r"(flip));
  return result;
}

template <typename To>
__device__ __forceinline__ To bits_as(uint32_t bits) {
  return *reinterpret_cast<const To*>(&bits);
}
template <typename From>
__device__ __forceinline__ uint32_t bits_of(const From& from) {
  return *reinterpret_cast<const uint32_t*>(&from);
}

// Eight neighbours as four pairs of bfloat16, exactly: numbers (0, 4), (1, 5), (2, 6) and (3, 7), lower half first. A float with a
// known exponent holds the bits as an integer, from which what the exponent adds is taken. words: 4 bytes of int4, 8 of the others.
__device__ __forceinline__ void to_bfloat16(Int4, const uint32_t* words, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t biased = mask_flip(words[0] >> 4 * i, 0x000f000f, 0x43084308);  // 128 + 8 + the number
    pairs[i] = bits_of(__hsub2(bits_as<__nv_bfloat162>(biased), bits_as<__nv_bfloat162>(0x43084308)));
  }
}

__device__ __forceinline__ void to_bfloat16(Int8, const uint32_t* words, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = __byte_perm(words[0], words[1], 0x0400 | i << 8 | i);
    const uint32_t rest = mask_flip(two, 0x007f007f, 0x43004300);  // 128 + the lower seven bits
    const uint32_t sign = mask_flip(two, 0x00800080, 0x43004300);  // 128, or 256 where the number is negative
    pairs[i] = bits_of(__hsub2(bits_as<__nv_bfloat162>(rest), bits_as<__nv_bfloat162>(sign)));
  }
}

__device__ __forceinline__ void to_bfloat16(Float8, const uint32_t* words, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = __byte_perm(words[0], words[1], 0x4000 | i << 12 | i << 4);  // in the upper bytes
    const uint32_t bits = (two & 0x80008000) | (two >> 4 & 0x07f007f0);               // the number times 2^-120
    pairs[i] = bits_of(__hmul2(bits_as<__nv_bfloat162>(bits), bits_as<__nv_bfloat162>(0x7b807b80)));
  }
}

// Eight neighbours times a scale as four pairs of float16 in their order, rounded once (float32 scales twice).
__device__ __forceinline__ uint4 to_scaled_half(Int4, const uint32_t* words, __half2 scale) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t biased = mask_flip(words[0] >> 4 * i, 0x000f000f, 0x64086408);  // 1024 + 8 + the number
    pairs[i] = bits_of(__hmul2(__hsub2(bits_as<__half2>(biased), bits_as<__half2>(0x64086408)), scale));
  }
  return {__byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410), __byte_perm(pairs[0], pairs[1], 0x7632),
          __byte_perm(pairs[2], pairs[3], 0x7632)};
}

// The same of int8 without a scale, exactly.
__device__ __forceinline__ void to_half(const uint32_t* words, __half2 (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t biased = __byte_perm(words[i / 2] ^ 0x80808080, 0x64646464, i % 2 ? 0x4342 : 0x4140);  // 1024 + 128 + the number
    pairs[i] = __hsub2(bits_as<__half2>(biased), bits_as<__half2>(0x64806480));
  }
}

__device__ __forceinline__ uint4 to_scaled_half(Int8, const uint32_t* words, __half2 scale) {
  __half2 pairs[4];
  to_half(words, pairs);
  return {bits_of(__hmul2(pairs[0], scale)), bits_of(__hmul2(pairs[1], scale)), bits_of(__hmul2(pairs[2], scale)),
          bits_of(__hmul2(pairs[3], scale))};
}

__device__ __forceinline__ uint4 to_scaled_half(Float8, const uint32_t* words, __half2 scale) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = __byte_perm(words[i / 2], 0, i % 2 ? 0x3424 : 0x1404);  // in the upper bytes
    const uint32_t bits = (two & 0x80008000) | (two >> 1 & 0x3f803f80);          // the number times 2^-8
    pairs[i] = bits_of(__hmul2(__hmul2(bits_as<__half2>(bits), bits_as<__half2>(0x5c005c00)), scale));
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

}  // namespace mythos::cuda
