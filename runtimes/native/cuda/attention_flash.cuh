// A warp's share of attention on tensor cores: sixteen queries, their scores and the running sum of values in registers
// (arXiv 2205.14135, 2307.08691).
#pragma once

#include "attention.cuh"
#include "barriers.cuh"
#include "tiles.cuh"

namespace mythos::cuda {

constexpr int kQueries = 16;  // of a warp

__device__ __forceinline__ uint32_t packed(float low, float high, const __half*) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t packed(float low, float high, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Row pitches in shared memory, with gaps so that ldmatrix reads eight rows without conflicts.
struct Pitches {
  static constexpr int kGap = 8;
  int key, value, stage;  // numbers; stage: of kKeys rows
  bool inside;            // the values are the keys' first channels

  __host__ __device__ Pitches(const Shape& n, int keys)
      : key(n.key_dim + kGap), inside(n.values_at == n.keys_at) {
    value = inside ? key : n.value_dim + kGap;
    stage = keys * (key + (inside ? 0 : value));
  }
};

// How scores become weights: all rows alike, into units of ln 2.
struct Alike {
  float scale;

  __device__ __forceinline__ float operator()(float score, int) const { return score * scale; }
  // What a row adds to the weights' sum; its values' weight is 2^exponent, or 0 where it is not seen.
  __device__ __forceinline__ float share(float weight, float, int, bool) const { return weight; }
};

// kPieces: pieces of eight channels of the values; kKeys: keys of a step. A thread holds numbers of queries lane / 4 and lane / 4 + 8.
template <typename C, int kPieces, int kKeys>
struct Flash {
  float sum[kPieces][4] = {};
  float largest[2] = {-FLT_MAX, -FLT_MAX}, total[2] = {0.0f, 0.0f};  // total: of this thread's keys alone

  // query: [kQueries, X], keys: [kKeys, X], values: [kKeys, Y] from this warp's first channel on. first, end: the keys of this step
  // that each of the two queries sees. weigh: Alike, or ByRow of attention_int8.cuh.
  template <typename Weigh>
  __device__ __forceinline__ void step(const C* query, const C* keys, const C* values, const Pitches& pitch, int key_dim, int pieces,
                                       const Weigh& weigh, const int (&first)[2], const int (&end)[2]) {
    const int lane = threadIdx.x % 32;
    float score[kKeys / 8][4] = {};
    const C* a_row = query + lane % 16 * pitch.key + lane / 16 * 8;
    const C* b_row = keys + (lane % 8 + lane / 16 * 8) * pitch.key + lane / 8 % 2 * 8;
#pragma unroll 2
    for (int k = 0; k < key_dim; k += 16) {
      uint32_t a[4];
      load_matrices(a, shared_address(a_row + k));
#pragma unroll
      for (int key = 0; key < kKeys; key += 16) {
        uint32_t b[4];
        load_matrices(b, shared_address(b_row + key * pitch.key + k));
        multiply(score[key / 8], a, b[0], b[1], static_cast<const C*>(nullptr));
        multiply(score[key / 8 + 1], a, b[2], b[3], static_cast<const C*>(nullptr));
      }
    }
    const auto key_of = [&](int piece, int i) { return piece * 8 + lane % 4 * 2 + i % 2; };
    const auto seen = [&](int piece, int i) {
      const int key = key_of(piece, i);
      return key >= first[i / 2] && key < end[i / 2];
    };
    float most[2] = {largest[0], largest[1]};
#pragma unroll
    for (int piece = 0; piece < kKeys / 8; ++piece)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[piece][i] = seen(piece, i) ? weigh(score[piece][i], key_of(piece, i)) : -FLT_MAX;
        most[i / 2] = fmaxf(most[i / 2], score[piece][i]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int distance = 2; distance > 0; distance /= 2) most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], distance));
    if (__any_sync(0xffffffffu, most[0] > largest[0] || most[1] > largest[1])) {
      const float factor[2] = {power_of_two(largest[0] - most[0]), power_of_two(largest[1] - most[1])};
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[piece][i] *= factor[i / 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) total[half] *= factor[half], largest[half] = most[half];
    }
#pragma unroll
    for (int piece = 0; piece < kKeys / 8; ++piece)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float exponent = score[piece][i] - most[i / 2];
        score[piece][i] = seen(piece, i) ? power_of_two(exponent) : 0.0f;
        total[i / 2] += weigh.share(score[piece][i], exponent, key_of(piece, i), seen(piece, i));
      }
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      const float(&low)[4] = score[key / 8], (&high)[4] = score[key / 8 + 1];
      const C* type = nullptr;
      const uint32_t a[4] = {packed(low[0], low[1], type), packed(low[2], low[3], type), packed(high[0], high[1], type),
                             packed(high[2], high[3], type)};
      const C* row = values + (key + lane % 16) * pitch.value + lane / 16 * 8;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += 2) {
        if (piece >= pieces) break;
        uint32_t b[4];
        load_transposed(b, shared_address(row + piece * 8));
        multiply(sum[piece], a, b[0], b[1], type);
        multiply(sum[piece + 1], a, b[2], b[3], type);
      }
    }
  }

  // The weights' sum of all keys so far.
  __device__ __forceinline__ float total_of(int half) const {
    float all = total[half];
#pragma unroll
    for (int distance = 2; distance > 0; distance /= 2) all += __shfl_xor_sync(0xffffffffu, all, distance);
    return all;
  }
};

// A thread's place among rows of so many pieces; it moves without dividing.
struct Place {
  int row, piece;

  __device__ __forceinline__ Place(int thread, int pieces) : row(0), piece(thread) { wrap(pieces); }
  __device__ __forceinline__ void move(int by, int pieces) { piece += by, wrap(pieces); }
  __device__ __forceinline__ void wrap(int pieces) {
    while (piece >= pieces) piece -= pieces, ++row;
  }
};

// Copies the queries [first, first + count) of a sequence and group [S M, X] to shared memory, zeros behind the last; `threads`
// threads do it.
template <typename C>
__device__ __forceinline__ void copy_queries(const Shape& n, const C* queries, int first, int count, int pitch, C* to, int threads) {
  const int pieces = n.key_dim / kPiece;
#pragma unroll 1
  for (Place at(threadIdx.x, pieces); at.row < count; at.move(threads, pieces)) {
    const bool valid = first + at.row < n.queries();
    const C* from = valid ? queries + int64_t(first + at.row) * n.key_dim + at.piece * kPiece : queries;
    copy_piece(shared_address(to + at.row * pitch + at.piece * kPiece), from, valid);
  }
}

// Which rows of a stage are copied: those in the cache may be before the new ones are there.
enum class Copied { kAll, kCached, kFresh };

// A ring of kStages stages of kRows rows, read kUnit at a time, filled while earlier ones are read: by bulk copies, a lane a row
// (compute capability 9.0 and later), else by a warp a row.
template <typename C, int kRows, int kUnit, int kWarps, int kStages>
class Stages {
 public:
  static constexpr int kRowsOfWarp = kRows / kWarps;
  static_assert(kRows % kWarps == 0 && kRowsOfWarp <= 32, "a lane a row");
  static constexpr int kInCopy = 16 / sizeof(C);  // numbers

  static size_t bytes(const Pitches& pitch) { return kStages * pitch.stage * sizeof(C); }

  // barriers: kStages of them, in shared memory. To be followed by a __syncthreads() of the block before the first wait.
  __device__ __forceinline__ Stages(void* memory, const Pitches& pitch, uint64_t* barriers)
      : memory_(static_cast<C*>(memory)), pitch_(pitch), barriers_(shared_address(barriers)) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) full(stage).begin(kWarps);
      show_barriers();
    }
    __syncthreads();
#endif
  }
  __device__ __forceinline__ C* at(int step) const { return memory_ + step % kStages * pitch_.stage; }

  // Begins to copy rows [from, to), kRows at most; what is behind them in their last unit becomes zero, unless it is int8: that is
  // always a number. A stage's rows must have been read by all. Where cached rows are copied alone, the fresh ones are to follow.
  __device__ __forceinline__ void load(const Shape& n, const Rows<C>& rows, int group, int from, int to, int step,
                                       Copied copied = Copied::kAll) const {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRowsOfWarp;
    C* stage = at(step);
#if __CUDA_ARCH__ >= 900
    const Barrier barrier = full(step);
    const uint32_t key_bytes = n.key_dim * sizeof(C), value_bytes = pitch_.inside ? 0 : n.value_dim * sizeof(C);
    const int row = first + lane;
    if (lane == 0 && copied != Copied::kFresh) {
      const uint32_t bytes = max(0, min(to - from - first, kRowsOfWarp)) * (key_bytes + value_bytes);
      barrier.expect(bytes);
    }
    __syncwarp();
    if (lane < kRowsOfWarp && from + row < to && (copied == Copied::kAll || (from + row < rows.cached) == (copied == Copied::kCached))) {
      const C* source = rows[from + row] + group * n.step;
      copy_bulk(shared_address(stage + row * pitch_.key), source + n.keys_at, key_bytes, barrier);
      if (value_bytes > 0) copy_bulk(shared_address(stage + kRows * pitch_.key + row * pitch_.value), source + n.values_at, value_bytes, barrier);
    }
    // Read with weights of zero, which are no cure for what is no number.
    if (!std::is_same_v<C, int8_t> && copied != Copied::kFresh) {
#pragma unroll 1
      for (int empty = max(first, to - from); empty < min(first + kRowsOfWarp, (to - from + kUnit - 1) / kUnit * kUnit); ++empty) {
#pragma unroll 1
        for (int i = lane; i < n.key_dim; i += 32) stage[empty * pitch_.key + i] = C(0.0f);
#pragma unroll 1
        for (int i = lane; !pitch_.inside && i < n.value_dim; i += 32) stage[kRows * pitch_.key + empty * pitch_.value + i] = C(0.0f);
      }
    }
#else
    if (copied == Copied::kFresh) return;  // kernels do not overlap: all rows are there from the start
    const int key_pieces = n.key_dim / kInCopy, value_pieces = pitch_.inside ? 0 : n.value_dim / kInCopy;
#pragma unroll 1
    for (int row = first; row < first + kRowsOfWarp; ++row) {
      const bool valid = from + row < to;
      const C* source = rows[valid ? from + row : to - 1] + group * n.step;
      const uint32_t key = shared_address(stage + row * pitch_.key), value = shared_address(stage + kRows * pitch_.key + row * pitch_.value);
#pragma unroll 1
      for (int piece = lane; piece < key_pieces; piece += 32) copy_piece(key + piece * 16, source + n.keys_at + piece * kInCopy, valid);
#pragma unroll 1
      for (int piece = lane; piece < value_pieces; piece += 32) copy_piece(value + piece * 16, source + n.values_at + piece * kInCopy, valid);
    }
#endif
  }

  // Waits for the rows of a step, and at the first one for all cp.async before; to be followed by a __syncthreads(). Every step up to
  // this one's next has been loaded, or committed empty.
  __device__ __forceinline__ void wait(int step) const {
#if __CUDA_ARCH__ >= 900
    if (step == 0) wait_but<0>();
    full(step).wait(step / kStages);
#else
    wait_but<kStages - 1>();
#endif
  }

  // Before copies into a stage that this thread has written to itself.
  __device__ __forceinline__ void settle() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }

 private:
  // Over when a step's rows are there.
  __device__ __forceinline__ Barrier full(int step) const { return Barrier(barriers_ + step % kStages * 8); }
  static __device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, const Barrier& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
                 "r"(barrier.address())
                 : "memory");
  }

  C* memory_;
  Pitches pitch_;
  uint32_t barriers_;
};

}  // namespace mythos::cuda
