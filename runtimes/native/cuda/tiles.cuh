// Tiles of a product on tensor cores (mma.sync m16n8k16, compute capability 8.0 and later): rows of both sides come by cp.async in
// a ring of stages, sums stay float32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace mythos::cuda {

constexpr int kTileThreads = 128, kTileWarps = kTileThreads / 32;
constexpr int kPiece = 8;  // numbers copied at a time, 16 bytes

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, zeros where there is nothing to copy.
__device__ __forceinline__ void copy_piece(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
// 4 bytes likewise.
__device__ __forceinline__ void copy_word(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
// The same of a piece of 16-bit numbers that is aligned to pairs alone: `pairs` of them, zeros behind.
__device__ __forceinline__ void copy_pairs(uint32_t to, const void* from, int pairs) {
#pragma unroll
  for (int pair = 0; pair < kPiece / 2; ++pair)
    copy_word(to + 4 * pair, static_cast<const char*>(from) + (pair < pairs ? 4 * pair : 0), pair < pairs);
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
__device__ __forceinline__ void wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft));
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

// Each matrix turned.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const __half*) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const __nv_bfloat16*) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A tile of sums [kM, kN] of kTileThreads threads, each of its kWarpsM x kWarpsN warps' part in registers: kMs x kNs pieces of
// 16 x 8. kDepth: numbers of a row in a stage.
template <typename W, int kM, int kN, int kWarpsM, int kDepth>
struct TileSums {
  static constexpr int kThreads = kTileThreads, kWarpsN = kTileWarps / kWarpsM;
  static constexpr int kMs = kM / kWarpsM / 16, kNs = kN / kWarpsN / 8;
  static constexpr int kPitch = kDepth + kPiece;  // ldmatrix reads eight rows of it without conflicts
  static constexpr int kPieces = kDepth / kPiece, kRowsAtOnce = kTileThreads / kPieces;
  static_assert(kM % kRowsAtOnce == 0 && kN % kRowsAtOnce == 0 && kNs % 2 == 0, "whole copies, and columns sixteen at a time");

  float sum[kMs][kNs][4] = {};

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 / kWarpsN * (kM / kWarpsM); }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % kWarpsN * (kN / kWarpsN); }

  // Adds the product of kDepth numbers of the rows of both sides.
  __device__ __forceinline__ void add(const W* left_rows, const W* right_rows) {
    const int lane = threadIdx.x % 32;
    const W* left = left_rows + (first_row() + lane % 16) * kPitch + lane / 16 * 8;
    const W* right = right_rows + (first_column() + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
    uint32_t a[2][kMs][4], b[2][kNs / 2][4];  // of this sixteen and of the next, which is read meanwhile
    const auto load = [&](int k) {
#pragma unroll
      for (int m = 0; m < kMs; ++m) load_matrices(a[k / 16 % 2][m], shared_address(left + m * 16 * kPitch + k));
#pragma unroll
      for (int n = 0; n < kNs / 2; ++n) load_matrices(b[k / 16 % 2][n], shared_address(right + n * 16 * kPitch + k));
    };
    load(0);
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      if (k + 16 < kDepth) load(k + 16);
      const auto& now_a = a[k / 16 % 2];
      const auto& now_b = b[k / 16 % 2];
#pragma unroll
      for (int m = 0; m < kMs; ++m)
#pragma unroll
        for (int n = 0; n < kNs; ++n)
          multiply(sum[m][n], now_a[m], now_b[n / 2][n % 2 * 2], now_b[n / 2][n % 2 * 2 + 1], static_cast<const W*>(nullptr));
    }
  }
};

// What a thread copies of the rows of both sides: a piece of the same rows in every stage of kDepth numbers.
template <typename W, int kM, int kN, int kThreads, int kDepth>
struct CopiedRows {
  static constexpr int kPieces = kDepth / kPiece, kRowsAtOnce = kThreads / kPieces;
  static constexpr int kLeftCopies = kM / kRowsAtOnce, kCopies = (kM + kN) / kRowsAtOnce;
  static_assert(kM % kRowsAtOnce == 0 && kN % kRowsAtOnce == 0, "whole copies");

  const W* from[kCopies];  // null where a row does not exist
  const W* any;
  int64_t left_jump, right_jump;  // from a row of a matrix to that of the next one
  int width, k;

  template <typename Left, typename Right>
  __device__ __forceinline__ CopiedRows(const Left& left, const Right& right)
      : any(left.any()), left_jump(left.jump()), right_jump(right.jump() * left.width()), width(left.width()), k(piece() * kPiece) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = row() + i * kRowsAtOnce;
      if (i < kLeftCopies) {
        from[i] = left(at);
      } else {
        const int64_t index = right(at - kM);
        from[i] = index < 0 ? nullptr : right.stack + index * width;
      }
    }
  }

  // Where in a stage a thread's first piece is.
  static __device__ __forceinline__ int row() { return threadIdx.x / kPieces; }
  static __device__ __forceinline__ int piece() { return threadIdx.x % kPieces; }

  // To the next stage's numbers.
  __device__ __forceinline__ void advance() {
    k += kDepth;
    if (k - piece() * kPiece >= width) {
      k = piece() * kPiece;
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        if (from[i] != nullptr) from[i] += i < kLeftCopies ? left_jump : right_jump;
    }
  }
};

// Such a tile of rows that are copied in kStages stages.
template <typename W, int kM, int kN, int kWarpsM, int kDepth, int kStages>
struct Tile : TileSums<W, kM, kN, kWarpsM, kDepth> {
  using Sums = TileSums<W, kM, kN, kWarpsM, kDepth>;
  using Sums::kPitch, Sums::kRowsAtOnce;
  static constexpr int kStage = (kM + kN) * kPitch;
  static constexpr int kSharedBytes = kStages * kStage * int(sizeof(W));

  struct Copies : CopiedRows<W, kM, kN, kTileThreads, kDepth> {
    using Rows = CopiedRows<W, kM, kN, kTileThreads, kDepth>;
    using Rows::from, Rows::width, Rows::k, Rows::Rows;

    __device__ __forceinline__ void next(W* stage) {
      const uint32_t to = shared_address(stage + this->row() * kPitch + this->piece() * kPiece);
#pragma unroll
      for (int i = 0; i < Rows::kCopies; ++i) {
        const bool valid = from[i] != nullptr && k < width;
        const W* source = valid ? from[i] + k : this->any;
        const uint32_t target = to + i * kRowsAtOnce * kPitch * int(sizeof(W));
        if (width % kPiece == 0) copy_piece(target, source, valid);
        else copy_pairs(target, source, valid ? (width - k) / 2 : 0);
      }
      commit();
      this->advance();
    }
  };

  // Adds left x right^T of `matrices` pairs of matrices. Left: (row) says where a row of the first begins, null where there is none;
  // jump() leads to the row of the next, width() is how long rows are, any() points to 16 bytes that exist. Right: (row) says which
  // row of its `stack` that is, -1 where there is none; jump() is how many rows later the next matrix begins.
  template <typename Left, typename Right>
  __device__ __forceinline__ void run(void* memory, int matrices, const Left& left, const Right& right) {
    W* stages = static_cast<W*>(memory);
    Copies copies(left, right);
    const int steps = matrices * ((left.width() + kDepth - 1) / kDepth);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copies.next(stages + step * kStage);
      else commit();
    }
    for (int step = 0; step < steps; ++step) {
      wait_but<kStages - 2>();
      __syncthreads();
      const int next = step + kStages - 1;
      if (next < steps) copies.next(stages + next % kStages * kStage);
      else commit();
      const W* stage = stages + step % kStages * kStage;
      this->add(stage, stage + kM * kPitch);
    }
  }
};

}  // namespace mythos::cuda
