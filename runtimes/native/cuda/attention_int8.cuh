// Rows of int8 on tensor cores: widened to float16, exactly, in shared memory, each one's scale in the weights of its values.
#pragma once

#include "attention_flash.cuh"

namespace mythos::cuda {

// How scores of int8 rows become weights. The weight of a row's values has its scale in it, so that it is at most 1 and nothing leaves
// float16's range; the weights' sum has not.
struct ByRow {
  const float2* rows;  // what scores are multiplied with, and the scale's binary logarithm

  __device__ __forceinline__ float operator()(float score, int row) const { return fmaf(score, rows[row].x, rows[row].y); }
  __device__ __forceinline__ float share(float, float exponent, int row, bool seen) const {
    return seen ? power_of_two(exponent - rows[row].y) : 0.0f;
  }
};

// Stages of int8 rows without gaps, with their scales, and one more of float16, in which each warp widens the rows that it has asked
// for.
template <int kRows, int kUnit, int kWarps, int kStages>
class WideningStages {
  using Narrow = Stages<int8_t, kRows, kUnit, kWarps, kStages>;
  static constexpr int kRowsOfWarp = Narrow::kRowsOfWarp;
  static_assert(Pitches::kGap == kPiece, "a piece between two rows");
  static constexpr float kLeastScale = 1e-30f;  // in logarithms

 public:
  static size_t bytes(const Pitches& pitch) {
    return kRows * (sizeof(float2) + kStages * sizeof(float)) + pitch.stage * sizeof(__half) + Narrow::bytes(without_gaps(pitch));
  }

  // As of Stages.
  __device__ __forceinline__ WideningStages(void* memory, const Pitches& pitch, uint64_t* barriers)
      : by_row_(static_cast<float2*>(memory)), scales_(reinterpret_cast<float*>(by_row_ + kRows)),
        wide_(reinterpret_cast<__half*>(scales_ + kStages * kRows)), pitch_(pitch),
        narrow_(wide_ + pitch.stage, without_gaps(pitch), barriers) {}
  __device__ __forceinline__ const __half* at(int) const { return wide_; }
  // Of the widened step's rows from `row` on.
  __device__ __forceinline__ ByRow weighing(int row) const { return {by_row_ + row}; }

  // Begins to copy rows [from, to), kRows at most, and their scales. This warp must have widened those of kStages steps before.
  __device__ __forceinline__ void load(const Shape& n, const Rows<int8_t>& rows, const Scales<int8_t>& scales, int group, int from, int to,
                                       int step) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kRowsOfWarp + lane;
    const bool valid = from + row < to;
    if (lane < kRowsOfWarp) copy_word(shared_address(scale_of(step, row)), scales.at[valid ? from + row : to - 1], valid);
    narrow_.load(n, rows, group, from, to, step);
  }

  // As of Stages; each load is a group of cp.async.
  __device__ __forceinline__ void wait(int step) const {
    narrow_.wait(step);
    wait_but<kStages - 1>();
  }

  // Widens this warp's rows of a step for which it has waited, of the first `count` in whole units. To be followed by a __syncthreads();
  // the float16 of the step before must have been read by all. scale: of the scores, into units of ln 2.
  __device__ __forceinline__ void widen(const Shape& n, int step, int count, float scale) const {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRowsOfWarp;
    if (first >= (count + kUnit - 1) / kUnit * kUnit) return;
    __syncwarp();  // what other lanes have copied
    if (lane < kRowsOfWarp) {
      const float of_row = *scale_of(step, first + lane);
      by_row_[first + lane] = {of_row * scale, __log2f(fmaxf(of_row, kLeastScale))};
    }
    const int8_t* from = narrow_.at(step);
    __half* to = wide_;
    int dim = n.key_dim;
#pragma unroll 1
    for (bool values = false;; values = true) {
      widen_rows(from + first * dim, to + first * (dim + Pitches::kGap), dim);
      if (pitch_.inside || values) break;
      from += kRows * dim, to += kRows * pitch_.key, dim = n.value_dim;
    }
    __syncwarp();  // the next copies may take the rows' place
  }

 private:
  // Of this warp's rows: a piece of a lane at a time, several read before they are written.
  static __device__ __forceinline__ void widen_rows(const int8_t* from, __half* to, int dim) {
    constexpr int kAtOnce = 4;
    const int pieces = dim / kPiece, count = kRowsOfWarp * pieces;
    const uint32_t reciprocal = (1u << 20) / pieces + 1;  // exact for what is divided here
#pragma unroll 1
    for (int first = threadIdx.x % 32; first < count; first += 32 * kAtOnce) {
      uint2 levels[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i * 32 < count) levels[i] = reinterpret_cast<const uint2*>(from)[first + i * 32];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int piece = first + i * 32, row = piece * reciprocal >> 20;
        const uint32_t words[2] = {levels[i].x, levels[i].y};
        __half2 pairs[4];
        to_half(words, pairs);
        if (piece < count)
          reinterpret_cast<uint4*>(to)[piece + row] = {bits_of(pairs[0]), bits_of(pairs[1]), bits_of(pairs[2]), bits_of(pairs[3])};
      }
    }
  }

  static __host__ __device__ Pitches without_gaps(Pitches pitch) {
    pitch.key -= Pitches::kGap, pitch.value -= Pitches::kGap;
    pitch.stage = kRows * (pitch.key + (pitch.inside ? 0 : pitch.value));
    return pitch;
  }
  __device__ __forceinline__ float* scale_of(int step, int row) const { return scales_ + step % kStages * kRows + row; }

  float2* by_row_;  // [kRows]
  float* scales_;   // [kStages, kRows]
  __half* wide_;
  Pitches pitch_;
  Narrow narrow_;
};

template <typename C, int kRows, int kUnit, int kWarps, int kStages>
using StagesOf = std::conditional_t<std::is_same_v<C, int8_t>, WideningStages<kRows, kUnit, kWarps, kStages>,
                                    Stages<C, kRows, kUnit, kWarps, kStages>>;

}  // namespace mythos::cuda
