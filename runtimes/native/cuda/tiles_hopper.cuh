// Tiles of a product on the tensor cores of compute capability 9.0 (wgmma, code for sm_90a alone): four warps at a time multiply 64 rows
// with 256, both read from shared memory. Rows come by cp.async in a ring of stages, sums stay float32 in registers.
#pragma once

#include "tiles.cuh"

namespace mythos::cuda {

// Makes what this thread wrote to shared memory, by cp.async too, visible to wgmma.
__device__ __forceinline__ void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// As __syncthreads(), of warps at different places in the code too.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 0;" ::: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_products_but() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// How wgmma finds rows of 128 bytes that begin at a shared address: eight rows are 1024 bytes, aligned to that, in which 16-byte piece p
// of row r stands at p ^ r % 8 (128-byte swizzle).
__device__ __forceinline__ uint64_t describe_rows(uint32_t address) {
  constexpr uint64_t kSwizzle = uint64_t(1) << 62, kEightRows = uint64_t(1024 >> 4) << 32, kUnused = uint64_t(1) << 16;
  return kSwizzle | kEightRows | kUnused | ((address & 0x3ffff) >> 4);
}

// c [64, 256] += a [64, 16] . b [256, 16]^T. Of every eight columns a thread holds what mma.sync's m16n8 would give its warp, of the
// warp's 16 rows.
#define MYTHOS_SUMS(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MYTHOS_FOUR_SUMS(n) MYTHOS_SUMS(n), MYTHOS_SUMS(n + 1), MYTHOS_SUMS(n + 2), MYTHOS_SUMS(n + 3)
#define MYTHOS_WGMMA(type)                                                                                                          \
  asm volatile(                                                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                                  \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"    \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"    \
      "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,"    \
      "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,"  \
      "%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, 1, 1, 1, 0, 0;"                                              \
      : MYTHOS_FOUR_SUMS(0), MYTHOS_FOUR_SUMS(4), MYTHOS_FOUR_SUMS(8), MYTHOS_FOUR_SUMS(12), MYTHOS_FOUR_SUMS(16),                  \
        MYTHOS_FOUR_SUMS(20), MYTHOS_FOUR_SUMS(24), MYTHOS_FOUR_SUMS(28)                                                            \
      : "l"(a), "l"(b))

__device__ __forceinline__ void multiply_rows(float (&c)[32][4], uint64_t a, uint64_t b, const __half*) { MYTHOS_WGMMA("f16"); }
__device__ __forceinline__ void multiply_rows(float (&c)[32][4], uint64_t a, uint64_t b, const __nv_bfloat16*) { MYTHOS_WGMMA("bf16"); }

// Keeps the compiler from reading or writing sums on the other side of this point.
__device__ __forceinline__ void hold(float (&c)[32][4]) {
#pragma unroll
  for (int n = 0; n < 32; ++n) asm volatile("" : MYTHOS_SUMS(n)::"memory");
}

#undef MYTHOS_WGMMA
#undef MYTHOS_FOUR_SUMS
#undef MYTHOS_SUMS

// A tile of sums [kM, 256] as Tile is, of four warps for every 64 rows. Rows are of whole 16-byte pieces. The sums of rows that do not
// exist are anything; where none of 64 exists, nothing is multiplied.
template <typename W, int kM, int kStages>
struct WideTile {
  static constexpr int kN = 256, kDepth = 64, kRowsTogether = 64, kThreads = kM / kRowsTogether * 128;
  static constexpr int kMs = 1, kNs = kN / 8;
  static constexpr int kRowBytes = kDepth * int(sizeof(W)), kStage = (kM + kN) * kRowBytes, kAlignment = 1024;
  static constexpr int kSharedBytes = kStages * kStage + kAlignment;
  static_assert(kM % kRowsTogether == 0 && kRowBytes == 128 && kStages >= 3, "rows as describe_rows() says; see run()");

  float sum[kMs][kNs][4] = {};

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 * 16; }
  static __device__ __forceinline__ int first_column() { return 0; }

  struct Copies : CopiedRows<W, kM, kN, kThreads, kDepth> {
    using Rows = CopiedRows<W, kM, kN, kThreads, kDepth>;
    using Rows::from, Rows::k, Rows::Rows;
    static_assert(Rows::kRowsAtOnce % 8 == 0, "a thread's pieces all stand at the same place of their rows");

    // Rows that do not exist are left as they are.
    __device__ __forceinline__ void next(uint32_t stage) {
      const uint32_t to = stage + this->row() * kRowBytes + (this->piece() ^ this->row() % 8) * 16;
      const bool valid = k < this->width;
      const int at = valid ? k : 0;
#pragma unroll
      for (int i = 0; i < Rows::kCopies; ++i)
        if (from[i] != nullptr) copy_piece(to + i * Rows::kRowsAtOnce * kRowBytes, from[i] + at, valid);
      commit();
      this->advance();
    }
  };

  // As Tile's. The products of a step run while the next step's copies are waited for, so that copies go into the stage of the step before
  // the last one, which everybody has done with.
  template <typename Left, typename Right>
  __device__ __forceinline__ void run(void* memory, int matrices, const Left& left, const Right& right) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const uint32_t stages = (shared_address(memory) + kAlignment - 1) / kAlignment * kAlignment;
    Copies copies(left, right);
    const int steps = matrices * ((left.width() + kDepth - 1) / kDepth);
    const auto copy = [&](int step) {
      if (step < steps) copies.next(stages + step % kStages * kStage);
      else commit();
    };
#pragma unroll
    for (int step = 0; step < kStages - 2; ++step) copy(step);
    const auto begin = [&](int step) {
      wait_but<kStages - 3>();
      show_copies();
      meet();
      copy(step + kStages - 2);
    };
    const int first = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) * kRowsTogether;
    if (left(first) == nullptr) {
      for (int step = 0; step < steps; ++step) begin(step);
      return;
    }
    hold(sum[0]);
    for (int step = 0; step < steps; ++step) {
      begin(step);
      const uint32_t stage = stages + step % kStages * kStage;
      const uint64_t a = describe_rows(stage + first * kRowBytes), b = describe_rows(stage + kM * kRowBytes);
      begin_products();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        const int ahead = k * int(sizeof(W)) / 16;  // descriptions count in 16 bytes
        multiply_rows(sum[0], a + ahead, b + ahead, static_cast<const W*>(nullptr));
      }
      commit_products();
      wait_products_but<1>();
    }
    wait_products_but<0>();
    hold(sum[0]);
#else
    __trap();  // the host chooses it nowhere else
    __builtin_unreachable();
#endif
  }
};

}  // namespace mythos::cuda
