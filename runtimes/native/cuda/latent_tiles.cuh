// Tiles of latent rows in shared memory, for attention_latents.cu: where they are, how they come there, and products with them by wgmma.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "attention_flash.cuh"
#include "barriers.cuh"
#include "launch.cuh"
#include "tiles_hopper.cuh"

namespace mythos::cuda {

constexpr int kFours = 4, kThreadsOfFour = 128;  // of four warps
constexpr int kMultiplying = kFours * kThreadsOfFour;
constexpr int kRows = 64, kUnit = 32, kUnits = kRows / kUnit;  // of a tile; that are copied at a time
constexpr int kUnitRows = 16;                                  // that a part consists of
constexpr int kChunk = 64, kChunkBytes = kRows * kChunk * 2;   // channels that stand together in a tile, rows of 128 bytes
constexpr int kQueryBytes = kQueries * kChunk * 2;             // of a chunk of queries
constexpr int kWeightBytes = kRows * kQueries * 2;             // of a tile
constexpr int kMostStages = 8, kTileAlignment = 1024;

struct Layout {
  int chunks, stages, inverse;  // inverse: of M, times 2^16 and rounded up

  // The most stages that fit.
  Layout(const Shape& n, size_t most_bytes) : chunks(ceil_div(n.key_dim, kChunk)), inverse((1 << 16) / n.heads + 1) {
    const int64_t left = int64_t(most_bytes) - kTileAlignment - int64_t(fixed());
    stages = int(std::clamp<int64_t>(left / int64_t(each()), 0, kMostStages));
  }
  __host__ __device__ int tile() const { return chunks * kChunkBytes; }
  size_t bytes() const { return kTileAlignment + fixed() + stages * each(); }
  size_t fixed() const { return chunks * kQueryBytes + (1 + kMultiplying / 32) * kQueries * sizeof(float); }
  size_t each() const { return tile() + kWeightBytes; }
  // The token that a query, of fewer than 64, belongs to.
  __device__ __forceinline__ int token_of(int query) const { return int(uint32_t(query * inverse) >> 16); }
};

// Addresses in shared memory. full: of a tile's unit, when its rows are there; empty: when all have read a tile; opened: when the kernels
// before this one are complete.
struct Places {
  uint32_t tiles, queries, weights, largest, of_warps, barriers;
  Layout layout;

  __device__ __forceinline__ Places(void* memory, const uint64_t* first_barrier, const Layout& l)
      : barriers(shared_address(first_barrier)), layout(l) {
    tiles = (shared_address(memory) + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
    queries = tiles + layout.stages * layout.tile();
    weights = queries + layout.chunks * kQueryBytes;
    largest = weights + layout.stages * kWeightBytes;
    of_warps = largest + kQueries * sizeof(float);
  }
  __device__ __forceinline__ uint32_t tile(int stage) const { return tiles + stage * layout.tile(); }
  __device__ __forceinline__ uint32_t weights_of(int stage) const { return weights + stage * kWeightBytes; }
  __device__ __forceinline__ Barrier opened() const { return Barrier(barriers); }
  __device__ __forceinline__ Barrier empty(int stage) const { return Barrier(barriers + (1 + stage) * 8); }
  __device__ __forceinline__ Barrier full(int stage, int unit) const { return Barrier(barriers + (1 + kMostStages + stage * kUnits + unit) * 8); }
  static constexpr int kBarriers = 1 + (1 + kUnits) * kMostStages;

  __device__ __forceinline__ void begin() const {
    opened().begin(1);
#pragma unroll 1
    for (int stage = 0; stage < layout.stages; ++stage) empty(stage).begin(kMultiplying / 32);
#pragma unroll 1
    for (int unit = 0; unit < layout.stages * kUnits; ++unit) full(0, unit).begin(1);
    show_barriers();
  }
};

// A tile's place in the ring, and how often it has come round.
struct Turn {
  int stage = 0, round = 0;

  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) stage = 0, ++round;
  }
  __device__ __forceinline__ Turn ahead(int by, int stages) const {
    Turn turn = *this;
    turn.stage += by;
    if (turn.stage >= stages) turn.stage -= stages, ++turn.round;
    return turn;
  }
};

// Where a row's piece of eight channels is, of chunks of so many bytes: as describe_rows() says.
__device__ __forceinline__ uint32_t place_of(uint32_t memory, int chunk_bytes, int row, int piece) {
  return memory + piece / 8 * chunk_bytes + row * 128 + (piece ^ row) % 8 * 16;
}
__device__ __forceinline__ void store_shared(uint32_t to, uint32_t bits) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(bits) : "memory");
}

// All that multiply; four warps of them.
__device__ __forceinline__ void meet_multiplying() { asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory"); }
__device__ __forceinline__ void meet_four(int four) { asm volatile("bar.sync %0, %1;" ::"r"(2 + four), "n"(kThreadsOfFour) : "memory"); }

// Floats as integers of the same order, and back.
__device__ __forceinline__ int ordered(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// A chunk's channels of a unit's rows of a sequence.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int channel, int row, int sequence, const Barrier& barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
               "l"(map), "r"(channel), "r"(row), "r"(sequence), "r"(barrier.address())
               : "memory");
#endif
}

// What the copying thread does first. A length is written behind the rows that it counts: where it is this call's already, they are there.
__device__ __forceinline__ void prepare_copies(const CUtensorMap* map, const Places& at, const int64_t* past_len, volatile int64_t* before) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
  at.begin();
  *before = load_acquired(past_len);
}

// Has a part's rows copied, by one thread; right are those that follow a tile's first one in the cache. The first tiles' copies begin
// before it is known that `before` is this call's length, and may be in vain; a unit at a time, since what other kernels still hand on
// would wait behind more. now: the length, when `opened` is over.
__device__ __forceinline__ void copy_tiles(const CUtensorMap* map, const Shape& n, const Places& at, int sequence, const int64_t* past_len,
                                           int64_t before, const volatile int64_t* now, const int (&tokens)[2]) {
  Turn turn;
  int first = 0, row = 0, end = 0;
  const auto find = [&](int64_t length) {
    const Rows<char> rows(n, nullptr, nullptr, length, 0);
    const Range range(n, rows, tokens[0], tokens[1], blockIdx.x, kUnitRows);
    first = rows.first, row = range.from, end = range.to;
  };
  find(before);
  const int early = min(ceil_div(end - row, kRows), at.layout.stages) * kUnits;
#pragma unroll 1
  for (int unit = 0;; ++unit, row += kUnit) {
    if (unit == early) {
      at.opened().wait(0);
      if (*now != before) find(load_acquired(past_len + sequence));
    }
    const int own = unit % kUnits;
    if (own == 0 && row >= end) break;
    if (own == 0 && turn.round > 0) at.empty(turn.stage).wait(turn.round - 1);
    if (unit > 0 && unit < early)
      while (!at.full(0, unit - 1).is_over(0) && !at.opened().is_over(0)) continue;
    const bool any = row < end;
    const Barrier full = at.full(turn.stage, own);
    full.expect(any ? at.layout.tile() / kUnits : 0);
    int position = first + row;
    if (position >= n.capacity) position -= n.capacity;
#pragma unroll 1
    for (int chunk = 0; any && chunk < at.layout.chunks; ++chunk)
      copy_box(at.tile(turn.stage) + chunk * kChunkBytes + own * kUnit * 128, map, chunk * kChunk, position, sequence, full);
    if (own == kUnits - 1) turn.next(at.layout.stages);
  }
}

// Leaves out tiles that were copied in vain.
__device__ __forceinline__ void pass_over(const Places& at, int tiles, Turn& turn) {
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile, turn.next(at.layout.stages)) {
#pragma unroll 1
    for (int unit = 0; unit < kUnits; ++unit) at.full(turn.stage, unit).wait(0);
    at.empty(turn.stage).arrive_as_warp();
  }
}

// As multiply_rows() of tiles_hopper.cuh, with 16 columns: c [64, 16] += a [64, 16] . b [16, 16]^T.
#define MYTHOS_SUMS(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MYTHOS_WGMMA(type, turned)                                                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                                                  \
               " {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, " turned ", " turned ";"                                       \
               : MYTHOS_SUMS(0), MYTHOS_SUMS(1)                                                                             \
               : "l"(a), "l"(b))
__device__ __forceinline__ void multiply_rows(float (&c)[2][4], uint64_t a, uint64_t b, const __half*) { MYTHOS_WGMMA("f16", "0"); }
__device__ __forceinline__ void multiply_rows(float (&c)[2][4], uint64_t a, uint64_t b, const __nv_bfloat16*) { MYTHOS_WGMMA("bf16", "0"); }
// c [64, 16] += a [16, 64]^T . b [16, 16].
__device__ __forceinline__ void multiply_columns(float (&c)[2][4], uint64_t a, uint64_t b, const __half*) { MYTHOS_WGMMA("f16", "1"); }
__device__ __forceinline__ void multiply_columns(float (&c)[2][4], uint64_t a, uint64_t b, const __nv_bfloat16*) { MYTHOS_WGMMA("bf16", "1"); }
// Keeps the compiler from reading or writing sums on the other side of this point.
__device__ __forceinline__ void hold(float (&c)[2][4]) { asm volatile("" : MYTHOS_SUMS(0), MYTHOS_SUMS(1)::"memory"); }
#undef MYTHOS_WGMMA
#undef MYTHOS_SUMS

// How wgmma finds weights [rows, 16 queries]: eight queries' of eight rows are 128 bytes, then the next eight queries'.
__device__ __forceinline__ uint64_t describe_weights(uint32_t address) {
  constexpr uint64_t kNextRows = uint64_t(256 >> 4) << 16, kNextQueries = uint64_t(128 >> 4) << 32;
  return kNextQueries | kNextRows | ((address & 0x3ffff) >> 4);
}

}  // namespace mythos::cuda
