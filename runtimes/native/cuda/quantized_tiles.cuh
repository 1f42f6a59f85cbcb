// Tiles of products of tokens with quantized matrices: the bytes of the matrix come by cp.async as the tokens do, and every thread turns
// those that it copied into float16 numbers in the shared memory that tensor cores read.
#pragma once

#include "quantized.cuh"
#include "tiles.cuh"

namespace mythos::cuda {

template <typename Q, int kM, int kN, int kWarpsM, int kDepth, int kStages>
struct QuantizedTile : TileSums<__half, kM, kN, kWarpsM, kDepth> {
  using Sums = TileSums<__half, kM, kN, kWarpsM, kDepth>;
  using Sums::kPieces, Sums::kPitch, Sums::kRowsAtOnce;
  static constexpr int kNumbers = kInSixteen<Q>, kWords = 32 / kNumbers;  // of a piece of the matrix; and words that eight of them take
  static constexpr int kRightPieces = kDepth / kNumbers, kRightRowsAtOnce = kTileThreads / kRightPieces;
  static constexpr int kLeftCopies = kM / kRowsAtOnce, kRightCopies = kN / kRightRowsAtOnce;
  static constexpr int kRawBytes = kN * kRightPieces * 16, kLeft = kM * kPitch, kRight = kN * kPitch;
  // Stages of bytes, stages of tokens, and two of the matrix' numbers.
  static constexpr int kSharedBytes = kStages * (kRawBytes + kLeft * 2) + 2 * kRight * 2;
  static_assert(kN % kRightRowsAtOnce == 0, "whole copies");

  // What a thread copies: pieces of the same rows in every stage.
  struct Copies {
    const __half* left_from[kLeftCopies];  // null where a row does not exist
    int64_t right_row[kRightCopies];       // -1 where there is none
    const __half* any;
    QuantizedStack stack;
    int64_t left_jump, right_jump;
    int width, k, scale_k;  // where in the rows the next copies, and the next scales, are taken from
    int64_t scale_jump;     // rows that scales are ahead by
    float scales[kRightCopies];

    template <typename Left, typename Right>
    __device__ __forceinline__ Copies(const Left& left, const Right& right)
        : any(left.any()), stack(right.stack), left_jump(left.jump()), right_jump(right.jump()), width(left.width()), k(0), scale_k(0),
          scale_jump(0) {
#pragma unroll
      for (int i = 0; i < kLeftCopies; ++i) left_from[i] = left(threadIdx.x / kPieces + i * kRowsAtOnce);
#pragma unroll
      for (int i = 0; i < kRightCopies; ++i) right_row[i] = right(threadIdx.x / kRightPieces + i * kRightRowsAtOnce);
    }

    __device__ __forceinline__ void next(__half* left, unsigned char* raw) {
      const int left_k = k + threadIdx.x % kPieces * kPiece, right_k = k + threadIdx.x % kRightPieces * kNumbers;
      const uint32_t to = shared_address(left + threadIdx.x / kPieces * kPitch + threadIdx.x % kPieces * kPiece);
#pragma unroll
      for (int i = 0; i < kLeftCopies; ++i) {
        const bool valid = left_from[i] != nullptr && left_k < width;
        copy_piece(to + i * kRowsAtOnce * kPitch * 2, valid ? left_from[i] + left_k : any, valid);
      }
#pragma unroll
      for (int i = 0; i < kRightCopies; ++i) {
        const bool valid = right_row[i] >= 0 && right_k < width;
        const void* from = valid ? static_cast<const void*>(stack.row(right_row[i]) + right_k / kNumbers * 16) : any;
        copy_piece(shared_address(raw + (threadIdx.x + i * kTileThreads) * 16), from, valid);
      }
      commit();
      if ((k += kDepth) < width) return;
      k = 0, scale_jump -= right_jump;
#pragma unroll
      for (int i = 0; i < kLeftCopies; ++i)
        if (left_from[i] != nullptr) left_from[i] += left_jump;
#pragma unroll
      for (int i = 0; i < kRightCopies; ++i)
        if (right_row[i] >= 0) right_row[i] += right_jump;
    }

    // Reads the scales of the step after that of the scales before.
    __device__ __forceinline__ void next_scales() {
      const int block = min((scale_k + int(threadIdx.x % kRightPieces) * kNumbers) >> stack.block_shift, stack.blocks - 1);
#pragma unroll
      for (int i = 0; i < kRightCopies; ++i) {
        if (right_row[i] < 0) continue;
        const int64_t at = (right_row[i] + scale_jump) * stack.blocks + block;
        scales[i] = stack.half_scales ? __half2float(static_cast<const __half*>(stack.scales)[at]) : static_cast<const float*>(stack.scales)[at];
      }
      if ((scale_k += kDepth) >= width) scale_k = 0, scale_jump += right_jump;
    }

    // to: the rows' numbers; raw: what this thread copied of them.
    __device__ __forceinline__ void convert(const unsigned char* raw, __half* to) const {
      __half* mine = to + threadIdx.x / kRightPieces * kPitch + threadIdx.x % kRightPieces * kNumbers;
#pragma unroll
      for (int i = 0; i < kRightCopies; ++i) {
        const uint4 piece = *reinterpret_cast<const uint4*>(raw + (threadIdx.x + i * kTileThreads) * 16);
        const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
        const __half2 scale = __float2half2_rn(right_row[i] < 0 ? 0.0f : scales[i]);
#pragma unroll
        for (int unit = 0; unit < kNumbers / 8; ++unit)
          *reinterpret_cast<uint4*>(mine + i * kRightRowsAtOnce * kPitch + unit * 8) = to_scaled_half(Q(), words + unit * kWords, scale);
      }
    }
  };

  // As Tile's.
  template <typename Left, typename Right>
  __device__ __forceinline__ void run(void* memory, int matrices, const Left& left, const Right& right) {
    auto* raw = static_cast<unsigned char*>(memory);
    auto* lefts = reinterpret_cast<__half*>(raw + kStages * kRawBytes);
    __half* rights = lefts + kStages * kLeft;
    Copies copies(left, right);
    const int steps = matrices * ((left.width() + kDepth - 1) / kDepth);
    copies.next_scales();
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copies.next(lefts + step * kLeft, raw + step * kRawBytes);
      else commit();
    }
    wait_but<kStages - 2>();
    copies.convert(raw, rights);
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) copies.next_scales();
      __syncthreads();
      const int next = step + kStages - 1, stage = next % kStages;
      if (next < steps) copies.next(lefts + stage * kLeft, raw + stage * kRawBytes);
      else commit();
      this->add(lefts + step % kStages * kLeft, rights + step % 2 * kRight);
      wait_but<kStages - 2>();
      if (step + 1 < steps) copies.convert(raw + (step + 1) % kStages * kRawBytes, rights + (step + 1) % 2 * kRight);
    }
  }
};

namespace detail {
template <typename Stored, int kM, int kN, int kWarpsM, int kDepth, int kStages, bool kIsQuantized = kQuantized<Stored>>
struct TileChoice {
  using Type = Tile<Stored, kM, kN, kWarpsM, kDepth, kStages>;
};
template <typename Q, int kM, int kN, int kWarpsM, int kDepth, int kStages>
struct TileChoice<Q, kM, kN, kWarpsM, kDepth, kStages, true> {
  using Type = QuantizedTile<Q, kM, kN, kWarpsM, kDepth, kStages>;
};
}  // namespace detail

// Stored: a float type, or how quantized weights are stored.
template <typename Stored, int kM, int kN, int kWarpsM, int kDepth, int kStages>
using TileOf = typename detail::TileChoice<Stored, kM, kN, kWarpsM, kDepth, kStages>::Type;

// The type in which they are multiplied, and the rows of their matrices.
template <typename Stored>
using Multiplied = std::conditional_t<kQuantized<Stored>, __half, Stored>;
template <typename Stored>
using StackOf = std::conditional_t<kQuantized<Stored>, QuantizedStack, const Stored*>;

template <typename Stored>
StackOf<Stored> make_stack(const void* values, const void* scales, int dtype, int scale_dtype, int block, int columns) {
  if constexpr (kQuantized<Stored>) return quantized_stack(values, scales, dtype, scale_dtype, block, columns);
  else return static_cast<const Stored*>(values);
}

}  // namespace mythos::cuda
