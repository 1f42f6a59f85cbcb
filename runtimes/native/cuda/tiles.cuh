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

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const __half*) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const __nv_bfloat16*) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A tile of sums [kM, kN] of kTileThreads threads, each of its kWarpsM x kWarpsN warps' part in registers: kMs x kNs pieces of
// 16 x 8. kDepth: numbers of a row in a stage.
template <typename W, int kM, int kN, int kWarpsM, int kDepth, int kStages>
struct Tile {
  static constexpr int kWarpsN = kTileWarps / kWarpsM;
  static constexpr int kMs = kM / kWarpsM / 16, kNs = kN / kWarpsN / 8;
  static constexpr int kPitch = kDepth + kPiece;  // ldmatrix reads eight rows of it without conflicts
  static constexpr int kStage = (kM + kN) * kPitch;
  static constexpr int kSharedBytes = kStages * kStage * int(sizeof(W));
  static constexpr int kPieces = kDepth / kPiece, kRowsAtOnce = kTileThreads / kPieces;
  static constexpr int kLeftCopies = kM / kRowsAtOnce, kCopies = (kM + kN) / kRowsAtOnce;
  static_assert(kM % kRowsAtOnce == 0 && kN % kRowsAtOnce == 0 && kNs % 2 == 0, "whole copies, and columns sixteen at a time");

  float sum[kMs][kNs][4] = {};

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 / kWarpsN * (kM / kWarpsM); }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % kWarpsN * (kN / kWarpsN); }

  // What a thread copies: a piece of the same rows in every stage.
  struct Copies {
    const W* from[kCopies];  // null where a row does not exist
    const W* any;
    int64_t left_jump, right_jump;  // from a row of a matrix to that of the next one
    int width, k;

    template <typename Left, typename Right>
    __device__ __forceinline__ Copies(const Left& left, const Right& right)
        : any(left.any()), left_jump(left.jump()), right_jump(right.jump()), width(left.width()), k(threadIdx.x % kPieces * kPiece) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int row = threadIdx.x / kPieces + i * kRowsAtOnce;
        from[i] = i < kLeftCopies ? left(row) : right(row - kM);
      }
    }

    __device__ __forceinline__ void next(W* stage) {
      const uint32_t to = shared_address(stage + threadIdx.x / kPieces * kPitch + threadIdx.x % kPieces * kPiece);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool valid = from[i] != nullptr && k < width;
        copy_piece(to + i * kRowsAtOnce * kPitch * int(sizeof(W)), valid ? from[i] + k : any, valid);
      }
      commit();
      k += kDepth;
      if (k - int(threadIdx.x % kPieces * kPiece) >= width) {
        k = threadIdx.x % kPieces * kPiece;
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
          if (from[i] != nullptr) from[i] += i < kLeftCopies ? left_jump : right_jump;
      }
    }
  };

  __device__ __forceinline__ void add(const W* stage) {
    const int lane = threadIdx.x % 32;
    const W* left = stage + (first_row() + lane % 16) * kPitch + lane / 16 * 8;
    const W* right = stage + (kM + first_column() + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kMs][4], b[kNs / 2][4];
#pragma unroll
      for (int m = 0; m < kMs; ++m) load_matrices(a[m], shared_address(left + m * 16 * kPitch + k));
#pragma unroll
      for (int n = 0; n < kNs / 2; ++n) load_matrices(b[n], shared_address(right + n * 16 * kPitch + k));
#pragma unroll
      for (int m = 0; m < kMs; ++m)
#pragma unroll
        for (int n = 0; n < kNs; ++n)
          multiply(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], static_cast<const W*>(nullptr));
    }
  }

  // Adds left x right^T of `matrices` pairs of matrices. Left, Right: (row) says where a row of the first begins, null where there
  // is none; jump() leads to the row of the next, width() is how long rows are, any() points to 16 bytes that exist.
  template <typename Left, typename Right>
  __device__ __forceinline__ void run(W* stages, int matrices, const Left& left, const Right& right) {
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
      add(stages + step % kStages * kStage);
    }
  }
};

}  // namespace mythos::cuda
