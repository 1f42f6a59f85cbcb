// Products of quantized matrices with few tokens, at the speed of reading them: on tensor cores, straight from memory.
//
// A warp multiplies sixteen rows at a step (mma.sync m16n8k16). A lane reads a piece of 16 bytes of two of them, and the four lanes of a
// row four pieces that follow one another. A piece has scales of its own: so that its products are summed apart, the tokens' side
// holds piece p of a token in column p alone, where the rows of the other lanes are zeros. The other four columns are used for
// precision: numbers of a token are the sum of two bfloat16 numbers, in columns 0 to 3 the larger ones. Weights are exact in bfloat16,
// sums float32.
#pragma once

#include "launch.cuh"
#include "numbers.cuh"
#include "quantized.cuh"
#include "tiles.cuh"

namespace mythos::cuda {

constexpr int kTileRows = 16;
constexpr int kMostStep = 128;  // numbers of a row at a step, of any storage

template <typename Q>
inline constexpr int kStep = 4 * kInSixteen<Q>;

// Numbers that a plane of a token takes: tokens lie as two planes of bfloat16, the numbers rounded, then what is missing. Zeros
// follow the last number.
__host__ __device__ __forceinline__ int plane_of(int width) { return (width + kMostStep - 1) / kMostStep * kMostStep; }

// Where number k lies in a plane: of every eight, pairs as to_bfloat16 makes them.
__device__ __forceinline__ int place_in_plane(int k) { return (k & ~7) | (k & 3) << 1 | (k >> 2 & 1); }

__device__ __forceinline__ void put_in_planes(__nv_bfloat16* planes, int plane, int k, float value) {
  const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
  planes[place_in_plane(k)] = rounded;
  planes[plane + place_in_plane(k)] = __float2bfloat16_rn(value - __bfloat162float(rounded));
}

// Eight neighbours of a row, zeros behind its end.
__device__ __forceinline__ void load_eight(const float* row, int k, int width, float (&to)[8]) {
  if (width % 8 == 0 && k < width) {
    const float4 low = reinterpret_cast<const float4*>(row + k)[0], high = reinterpret_cast<const float4*>(row + k)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w, to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = k + i < width ? row[k + i] : 0.0f;
}

// Planes [count, 2, plane] of tokens [count, width] by a block of kThreads, times the norm's weight where there is one; squares
// [count, kThreads / 32] then gets what sums of products are to be multiplied with, as factor_of() reads it.
template <int kThreads>
__device__ __forceinline__ void fill_planes(__nv_bfloat16* planes, const float* from, int count, int width, const float* norm, float* squares) {
  const int eights = plane_of(width) / 8;
#pragma unroll 1
  for (int token = 0; token < count; ++token) {
    const float* row = from + int64_t(token) * width;
    auto* plane = reinterpret_cast<uint4*>(planes) + 2 * token * eights;
    float sum = 0.0f;
#pragma unroll 1
    for (int at = threadIdx.x; at < eights; at += kThreads) {
      float x[8], scale[8];
      uint32_t rounded[4], rest[4];
      load_eight(row, at * 8, width, x);
      if (norm != nullptr) {
        load_eight(norm, at * 8, width, scale);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(x[i], x[i], sum), x[i] *= scale[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // in the order of place_in_plane()
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 4]);
        rounded[i] = bits_of(pair);
        rest[i] = bits_of(__floats2bfloat162_rn(x[i] - __low2float(pair), x[i + 4] - __high2float(pair)));
      }
      plane[at] = {rounded[0], rounded[1], rounded[2], rounded[3]};
      plane[eights + at] = {rest[0], rest[1], rest[2], rest[3]};
    }
    if (norm == nullptr) continue;
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) squares[token * (kThreads / 32) + threadIdx.x / 32] = sum;
  }
}

// Four bytes of which the first is aligned, zeros from `end` on: nothing behind it is read.
__device__ __forceinline__ uint32_t load_four(const uint8_t* from, const uint8_t* end) {
  if (from + 4 <= end) return __ldg(reinterpret_cast<const uint32_t*>(from));
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i)
    if (from + i < end) word |= uint32_t(from[i]) << 8 * i;
  return word;
}

// 16 bytes, zeros from `end` on. inside: whether the first one lies before it.
template <bool kAligned>
__device__ __forceinline__ uint4 load_sixteen(const uint8_t* from, const uint8_t* end, bool inside) {
  if constexpr (kAligned) return inside ? __ldcs(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
  const uint32_t past = reinterpret_cast<uintptr_t>(from) % 4;
  uint32_t words[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = load_four(from - past + 4 * i, end);
  return {__funnelshift_r(words[0], words[1], 8 * past), __funnelshift_r(words[1], words[2], 8 * past),
          __funnelshift_r(words[2], words[3], 8 * past), __funnelshift_r(words[3], words[4], 8 * past)};
}

// Rows of a matrix from one on: what lanes' places are counted from, with 32 bits.
struct RowsFrom {
  const uint8_t* values;
  const void* scales;

  __device__ __forceinline__ RowsFrom() {}
  __device__ __forceinline__ RowsFrom(const QuantizedStack& w, int64_t first)
      : values(w.row(first)), scales(static_cast<const char*>(w.scales) + first * w.blocks * (w.half_scales ? 2 : 4)) {}
};

// What a lane reads of sixteen rows at a step: rows lane / 4 and lane / 4 + 8. Of its columns' pieces it has the scales.
template <typename Q, typename S, bool kAligned>
struct LoadedRows {
  uint32_t words[2][4];
  S scales[2][2];

  // first: of the rows; last: the last one that there is, which those behind it are read as. Both count from `from` on.
  __device__ __forceinline__ void load(const QuantizedStack& w, const RowsFrom& from, int first, int last, int step) {
    const int lane = threadIdx.x % 32, column = (step * 4 + lane % 4) * 16, k = (step * 4 + lane % 2 * 2) * kInSixteen<Q>;
    const int blocks[2] = {min(k >> w.block_shift, w.blocks - 1), min((k + kInSixteen<Q>) >> w.block_shift, w.blocks - 1)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(first + lane / 4 + half * 8, last);
      const uint8_t* values = from.values + uint32_t(row * w.row_bytes);
      const uint4 piece = load_sixteen<kAligned>(values + column, values + w.row_bytes, column < w.row_bytes);
      words[half][0] = piece.x, words[half][1] = piece.y, words[half][2] = piece.z, words[half][3] = piece.w;
#pragma unroll
      for (int i = 0; i < 2; ++i) scales[half][i] = __ldg(static_cast<const S*>(from.scales) + uint32_t(row * w.blocks + blocks[i]));
    }
  }
};

// Adds a step of rows of kMatrices matrices, times kTokens tokens, to a lane's part of the sums of its two rows. read(token, unit):
// numbers 8 unit to 8 unit + 7 of this lane's piece of the token, for columns lane / 4.
template <typename Q, int kTokens, int kMatrices, typename Rows, typename Read>
__device__ __forceinline__ void add_step(const Rows (&rows)[kMatrices], const Read& read, float (&sum)[kMatrices][kTokens][2]) {
  constexpr int kUnits = kInSixteen<Q> / 8, kWords = 4 / kUnits;
  float products[kMatrices][kTokens][4] = {};
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    uint4 x[kTokens];
#pragma unroll
    for (int token = 0; token < kTokens; ++token) x[token] = read(token, unit);
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      uint32_t upper[4], lower[4];
      to_bfloat16(Q(), rows[m].words[0] + unit * kWords, upper);
      to_bfloat16(Q(), rows[m].words[1] + unit * kWords, lower);
      const uint32_t first[4] = {upper[0], lower[0], upper[1], lower[1]}, second[4] = {upper[2], lower[2], upper[3], lower[3]};
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        multiply(products[m][token], first, x[token].x, x[token].y, static_cast<const __nv_bfloat16*>(nullptr));
        multiply(products[m][token], second, x[token].z, x[token].w, static_cast<const __nv_bfloat16*>(nullptr));
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kMatrices; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scales[2] = {to_float(rows[m].scales[half][0]), to_float(rows[m].scales[half][1])};
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const auto& two = products[m][token];
        sum[m][token][half] = fmaf(two[2 * half], scales[0], fmaf(two[2 * half + 1], scales[1], sum[m][token][half]));
      }
    }
}

// Over the lanes of a row.
__device__ __forceinline__ float sum_of_four(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// A lane's pieces of tokens in shared memory; of lanes whose columns are other pieces' they are zeros.
template <typename Q>
struct SharedPlanes {
  const uint4* first;
  int next_token, next_step;  // in 16 bytes

  // zeros: 64 bytes of them
  __device__ __forceinline__ SharedPlanes(const __nv_bfloat16* planes, const uint4* zeros, int plane) {
    const int lane = threadIdx.x % 32, column = lane / 4, piece = lane % 4;
    const int mine = column % 4 == piece;  // a number: lanes must not part here
    const auto* own = reinterpret_cast<const uint4*>(planes + column / 4 * plane + piece * kInSixteen<Q>);
    first = zeros + mine * (own - zeros);
    next_token = mine * (2 * plane / 8), next_step = mine * (kStep<Q> / 8);
    __syncwarp();
  }
};

// A warp's way through the steps of tiles of rows, of which its block's warps share the steps out.
struct Cursor {
  int tile, step;

  __device__ __forceinline__ void advance(int by, int steps) {
    for (step += by; step >= steps; step -= steps) ++tile;
  }
};

// Sums of `tiles` tiles of sixteen rows by a block of kWarps warps. kMatrices: 2 where every tile has rows of two matrices.
template <typename Q, typename S, bool kAligned, int kMatrices, int kWarps>
class RowTiles {
 public:
  // first: row of the stack; rows: how many the matrix has from there on; second: from a row to that of the second matrix.
  __device__ __forceinline__ RowTiles(const QuantizedStack& w, int64_t first, int rows, int64_t second, int tiles)
      : w_(w), last_(rows - 1), tiles_(tiles), steps_((w.row_bytes + 63) / 64), start_{0, 0}, ahead_{0, 0} {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) from_[m] = RowsFrom(w, first + m * second);
    start_.advance(threadIdx.x / 32, steps_);
    ahead_ = start_;
  }

  // Starts to read the first steps' rows.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i);
  }

  // partial [tiles, kWarps, kTokens, kMatrices * 16], zeros before, gets every warp's sums.
  template <int kTokens>
  __device__ __forceinline__ void run(const SharedPlanes<Q>& x, float* partial) {
    float sum[kMatrices][kTokens][2] = {};
    Cursor at = start_;
#pragma unroll 1
    while (at.tile < tiles_) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (at.tile >= tiles_) break;
        __syncwarp();  // a product is of all lanes
        const uint4* step = x.first + at.step * x.next_step;
        add_step<Q, kTokens>(loaded_[i], [&](int token, int unit) { return step[token * x.next_token + unit]; }, sum);
        load(i);
        const int tile = at.tile;
        at.advance(kWarps, steps_);
        if (at.tile != tile) store(tile, sum, partial);
      }
    }
  }

 private:
  static constexpr int kAhead = kMatrices == 2 ? 2 : 4;

  __device__ __forceinline__ void load(int slot) {
    if (ahead_.tile >= tiles_) return;
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) loaded_[slot][m].load(w_, from_[m], ahead_.tile * kTileRows, last_, ahead_.step);
    ahead_.advance(kWarps, steps_);
  }

  template <int kTokens>
  __device__ __forceinline__ void store(int tile, float (&sum)[kMatrices][kTokens][2], float* partial) const {
    const int lane = threadIdx.x % 32;
    float* of_warp = partial + (tile * kWarps + threadIdx.x / 32) * kTokens * kMatrices * kTileRows;
#pragma unroll
    for (int token = 0; token < kTokens; ++token)
#pragma unroll
      for (int m = 0; m < kMatrices; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float total = sum_of_four(sum[m][token][half]);
          if (lane % 4 == 0) of_warp[(token * kMatrices + m) * kTileRows + half * 8 + lane / 4] = total;
          sum[m][token][half] = 0.0f;
        }
  }

  const QuantizedStack& w_;
  RowsFrom from_[kMatrices];
  int last_, tiles_, steps_;
  Cursor start_, ahead_;
  LoadedRows<Q, S, kAligned> loaded_[kAhead][kMatrices];
};

// Shared memory of a block that runs RowTiles: its tokens' planes, zeros, and the warps' sums.
struct RowTilesMemory {
  int plane, partial;  // numbers of a plane, and of the sums

  __host__ __device__ __forceinline__ RowTilesMemory(int width, int tiles, int warps, int tokens, int matrices)
      : plane(plane_of(width)), partial(tiles * warps * tokens * matrices * kTileRows) {}
  __host__ __device__ __forceinline__ int bytes(int tokens) const { return planes_bytes(tokens) + 64 + partial * int(sizeof(float)); }
  __host__ __device__ __forceinline__ int planes_bytes(int tokens) const { return tokens * 2 * plane * int(sizeof(__nv_bfloat16)); }
};

// A thread's turn among the rows of tokens, `rows` of each; it moves without dividing.
struct Turn {
  int token, row, rows;

  __device__ __forceinline__ Turn(int thread, int rows_of_token) : token(0), row(thread), rows(rows_of_token) { wrap(); }
  __device__ __forceinline__ void move(int by) { row += by, wrap(); }
  __device__ __forceinline__ void wrap() {
    while (row >= rows) row -= rows, ++token;
  }
};

// The zeros that a block's sums begin with. The caller synchronizes.
template <int kThreads>
__device__ __forceinline__ void clear(uint4* zeros, float* partial, int count) {
  if (threadIdx.x < 4) zeros[threadIdx.x] = {0, 0, 0, 0};
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) partial[i] = 0.0f;
}

}  // namespace mythos::cuda
