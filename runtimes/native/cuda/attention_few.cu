// Attention of few queries: the time is that of reading the rows once. Each warp of a block scores sixteen rows of a step, and sums a
// share of the values' channels over all of them (arXiv 2205.14135).
#include "attention_int8.cuh"
#include "launch.cuh"

namespace mythos::cuda {
namespace {

constexpr int kStages = 2;

// A step's rows in shared memory, and what warps tell each other.
template <typename C, int kWarps>
struct Block {
  using Number = CacheNumber<C>;
  static constexpr int kRows = kWarps * 16, kWeightPitch = kRows + 8;
  using Ring = StagesOf<C, kRows, 16, kWarps, kStages>;
  Number *query, *weights, *stages;  // [kQueries, X], [kQueries, kRows], the ring's
  float* numbers;                    // [kQueries, kWarps]

  __device__ __forceinline__ Block(void* memory, const Pitches& pitch) {
    numbers = static_cast<float*>(memory);
    query = reinterpret_cast<Number*>(numbers + kWarps * kQueries);
    weights = query + kQueries * pitch.key;
    stages = weights + kQueries * kWeightPitch;
  }
  static size_t bytes(const Pitches& pitch) {
    return kWarps * kQueries * sizeof(float) + kQueries * (pitch.key + kWeightPitch) * sizeof(Number) + Ring::bytes(pitch);
  }
};

// What a thread has of its part, of queries lane / 4 and lane / 4 + 8 of sixteen: its warp's share of the values' channels, kPairs pairs of
// eight; and of the weights those of its own rows.
template <typename C, int kWarps, int kPairs>
struct Sums {
  using Memory = Block<C, kWarps>;
  using Number = CacheNumber<C>;
  static constexpr const Number* kType = nullptr;
  float sum[kPairs][2][4], largest[2], total[2];

  static __device__ __forceinline__ int first_channel() { return threadIdx.x / 32 * kPairs * 16; }
  // Where a query's number of this warp is.
  static __device__ __forceinline__ float* number_of(const Memory& at, int half) {
    return at.numbers + (threadIdx.x % 32 / 4 + half * 8) * kWarps + threadIdx.x / 32;
  }
  // The numbers of all warps.
  static __device__ __forceinline__ void numbers_of(const Memory& at, int half, float (&to)[kWarps]) {
    const auto* from = reinterpret_cast<const float2*>(at.numbers + (threadIdx.x % 32 / 4 + half * 8) * kWarps);
#pragma unroll
    for (int i = 0; i < kWarps / 2; ++i) to[2 * i] = from[i].x, to[2 * i + 1] = from[i].y;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) largest[half] = -FLT_MAX, total[half] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs * 8; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0.0f;
  }

  static constexpr int kAtOnce = 4;                  // sixteens of channels that are read before they are multiplied
  static constexpr int kBoth = (kAtOnce + 1) * 16;  // channels that take both of the loops
  // Products of the queries with a warp's sixteen rows.
  static __device__ __forceinline__ void score(const Number* query, const Number* keys, int pitch, int channels, float (&to)[2][4]) {
    const int lane = threadIdx.x % 32;
    const uint32_t a_row = shared_address(query + lane % 16 * pitch + lane / 16 * 8);
    const uint32_t b_row = shared_address(keys + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
    float other[2][4] = {};     // of every second sixteen: sums do not wait for one another
    int channel = 0;
#pragma unroll 1
    for (; channel + 16 * kAtOnce <= channels; channel += 16 * kAtOnce) {
      uint32_t a[kAtOnce][4], b[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        load_matrices(a[i], a_row + (channel + i * 16) * sizeof(Number)), load_matrices(b[i], b_row + (channel + i * 16) * sizeof(Number));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) multiply(i % 2 ? other[half] : to[half], a[i], b[i][2 * half], b[i][2 * half + 1], kType);
    }
#pragma unroll 1
    for (; channel < channels; channel += 16) {
      uint32_t a[4], b[4];
      load_matrices(a, a_row + channel * sizeof(Number)), load_matrices(b, b_row + channel * sizeof(Number));
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply(to[half], a, b[2 * half], b[2 * half + 1], kType);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i / 4][i % 4] += other[i / 4][i % 4];
  }

  // Scores become weights of the rows [first, end) that each query sees, `own` this warp's first of them; the sums so far get the same base.
  template <typename Weigh>
  __device__ __forceinline__ void weigh(const Memory& at, float (&scores)[2][4], int own, const int (&first)[2], const int (&end)[2],
                                        const Weigh& weighed) {
    const int lane = threadIdx.x % 32;
    const auto row_of = [&](int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; };
    float most[2] = {-FLT_MAX, -FLT_MAX};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = own + row_of(i), half = i % 4 / 2;
      float& value = scores[i / 4][i % 4];
      value = row >= first[half] && row < end[half] ? weighed(value, row_of(i)) : -FLT_MAX;
      most[half] = fmaxf(most[half], value);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int distance = 2; distance > 0; distance /= 2) most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], distance));
      if (lane % 4 == 0) *number_of(at, half) = most[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float of_warps[kWarps];
      numbers_of(at, half, of_warps);
      most[half] = largest[half];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) most[half] = fmaxf(most[half], of_warps[w]);
      const float factor = power_of_two(largest[half] - most[half]);
      largest[half] = most[half], total[half] *= factor;
#pragma unroll
      for (int i = 0; i < kPairs * 4; ++i) sum[i / 4][i / 2 % 2][half * 2 + i % 2] *= factor;
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int half = i % 4 / 2;
      float weight[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float value = scores[i / 4][i % 4 + j], exponent = value - most[half];
        const bool seen = value != -FLT_MAX;
        weight[j] = seen ? power_of_two(exponent) : 0.0f;
        total[half] += weighed.share(weight[j], exponent, row_of(i + j), seen);
      }
      *reinterpret_cast<uint32_t*>(at.weights + (lane / 4 + half * 8) * Memory::kWeightPitch + threadIdx.x / 32 * 16 + i / 4 * 8 + lane % 4 * 2) =
          packed(weight[0], weight[1], kType);
    }
  }

  // Adds the values of a step's rows by their weights.
  __device__ __forceinline__ void add(const Memory& at, const Number* values, int pitch, int count) {
    const int lane = threadIdx.x % 32;
    const uint32_t a_row = shared_address(at.weights + lane % 16 * Memory::kWeightPitch + lane / 16 * 8);
    const uint32_t b_row = shared_address(values + lane % 16 * pitch + first_channel() + lane / 16 * 8);
#pragma unroll 1
    for (int row = 0; row < count; row += 16) {
      uint32_t a[4], b[kPairs][4];
      load_matrices(a, a_row + row * sizeof(Number));
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) load_transposed(b[pair], b_row + (row * pitch + pair * 16) * sizeof(Number));
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) multiply(sum[pair][0], a, b[pair][0], b[pair][1], kType), multiply(sum[pair][1], a, b[pair][2], b[pair][3], kType);
    }
  }

  // Hands the part on, of the first `count` queries; `query`: the first of them, times P plus the part.
  __device__ __forceinline__ void write(const Shape& n, const Memory& at, const Partial& out, int64_t query, int count) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int distance = 2; distance > 0; distance /= 2) total[half] += __shfl_xor_sync(0xffffffffu, total[half], distance);
      if (lane % 4 == 0) *number_of(at, half) = total[half];
      const int own = lane / 4 + half * 8;
      float* to = out.sums + (query + int64_t(own) * n.parts) * n.value_dim + first_channel() + lane % 4 * 2;
      if (own < count)
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i)
          if (first_channel() + i * 8 < n.value_dim)
            *reinterpret_cast<float2*>(to + i * 8) = {sum[i / 2][i % 2][half * 2], sum[i / 2][i % 2][half * 2 + 1]};
    }
    __syncthreads();
    if (threadIdx.x < 32 && lane % 4 == 0)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float of_warps[kWarps], all = 0.0f;
        numbers_of(at, half, of_warps);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) all += of_warps[w];
        const int own = lane / 4 + half * 8;
        if (own < count) *reinterpret_cast<float2*>(out.states + 2 * (query + int64_t(own) * n.parts)) = {largest[half], all};
      }
  }
};

// Sixteen queries of a sequence and group, and the tokens that they belong to.
struct Sixteen {
  int group, first, last, first_token, last_token;

  __device__ __forceinline__ Sixteen(const Shape& n, int block) : group(block), first(0) {
    while (group >= n.groups) group -= n.groups, first += kQueries;
    last = min(first + kQueries, n.queries()) - 1, first_token = token_of(n, first), last_token = token_of(n, last);
  }
  static __device__ __forceinline__ int token_of(const Shape& n, int query) {
    int token = 0;
    while (query >= n.heads) query -= n.heads, ++token;
    return token;
  }
  // That of a thread's query.
  __device__ __forceinline__ int token(const Shape& n, int half) const {
    return last_token == first_token ? first_token : token_of(n, min(first + int(threadIdx.x) % 32 / 4 + half * 8, last));
  }
};

// Asks for up to `most` of the cached rows [from, to), shared out among the blocks that read them.
template <typename C>
__device__ __forceinline__ void prefetch_rows(const Shape& n, const Rows<C>& rows, int from, int to, int most) {
  const int count = min(min(to, rows.cached) - from, most);
  if (count > 0) prefetch_share(rows[from], int64_t(min(count, rows.together(from))) * n.width * sizeof(C), blockIdx.y, gridDim.y);
}

// Blocks: (P, sixteens of a group's queries times G, B). Code is kept short: each launch reads it from memory, and runs most of it once.
template <typename C, int kWarps, int kPairs>
__global__ void __launch_bounds__(kWarps * 32)
    attend_few_rows(Shape n, const CacheNumber<C>* queries, AllRows<C> cache, const int64_t* past_len, Partial out) {
  using Memory = Block<C, kWarps>;
  using Number = CacheNumber<C>;
  constexpr int kRows = Memory::kRows;
  constexpr bool kInt8 = std::is_same_v<C, int8_t>;  // such rows leave their stage before they are read
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ uint64_t barriers[kStages];
  const Pitches pitch(n, kRows);
  const Memory at(memory, pitch);
  const int sequence = blockIdx.z, part = blockIdx.x, warp = threadIdx.x / 32;
  const Sixteen these(n, blockIdx.y);
  const int64_t all_queries = (int64_t(sequence) * n.groups + these.group) * n.queries();  // in front of this sequence and group
  const typename Memory::Ring stages(at.stages, pitch, barriers);
  Rows<C> rows(n, cache.past, cache.fresh);
  Scales<C> scales(n, cache, 0, sequence);
  const float scale = n.scale * kLog2E;
  int turn = 0, first_row = 0, end_row = 0, first[2] = {0, 0}, end[2] = {kRows, kRows};  // of the ring; the part; what two queries see
  Sums<C, kWarps, kPairs> sums;
  const auto load = [&](int step, Copied copied) {
    const int from = first_row + step * kRows, to = max(from, min(from + kRows, end_row));
    if constexpr (kInt8) {
      if (from < end_row) stages.load(n, rows, scales, these.group, from, to, step);
    } else {
      stages.load(n, rows, these.group, from, to, turn + step, copied);
    }
    commit();
  };
  // Steps whose cached rows are copied before the wait. Of latents it is one: more would hold up what this call still waits for.
  const int early = kInt8 ? 0 : pitch.inside ? 1 : kStages;
  // All first steps, of which so many have their cached rows.
  const auto load_first = [&](int copied) {
#pragma unroll 1
    for (int step = 0; step < kStages; ++step) load(step, step < copied ? Copied::kFresh : Copied::kAll);
  };
  const auto find_rows = [&](int64_t length) {
    rows = Rows<C>(n, cache.past, cache.fresh, length, sequence), scales = Scales<C>(n, cache, length, sequence);
    const Range range(n, rows, these.first_token, these.last_token, part, 16);
    first_row = range.from, end_row = range.to;
  };
  let_next_start();
  // A length is written behind the rows that it counts: where it is this call's already, they are there. Int8 rows are only asked for.
  const int64_t length = load_acquired(past_len + sequence);
  find_rows(length);
  if constexpr (kInt8) {
    prefetch_rows(n, rows, first_row, end_row, kStages * kRows);
    prefetch_rows(n.of_scales(), scales.at, first_row, end_row, kStages * kRows);
  }
#pragma unroll 1
  for (int step = 0; step < early; ++step) load(step, Copied::kCached);
  // The first step computes with what is in memory by chance, and only brings the code near while other kernels run.
#pragma unroll 1
  for (int step = -1;; ++step) {
    if (step == 0) {
      wait_for_previous();
      const int64_t now = past_len[sequence];
      copy_queries(n, queries + all_queries * n.key_dim, these.first, kQueries, pitch.key, at.query, kWarps * 32);
      if constexpr (kInt8) find_rows(now);
      load_first(early);
      if constexpr (!kInt8)
        if (now != length) {
#pragma unroll 1
          for (int first = 0; first < kStages; ++first) stages.wait(first);
          turn = kStages;  // the ring begins a second one
          stages.settle();
          __syncthreads();
          find_rows(now), load_first(0);
        }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = these.token(n, half);
        first[half] = rows.first_seen(n, token), end[half] = min(rows.end_seen(token), end_row);
      }
    }
    if (step <= 0) sums.clear();
    const int from = first_row + max(step, 0) * kRows, count = step < 0 ? 16 : min(kRows, end_row - from);
    if (count <= 0) break;
    if (step >= 0) stages.wait(turn + step);
    if constexpr (kInt8) {
      stages.widen(n, max(step, 0), count, scale);
      if (step >= 0) load(step + kStages, Copied::kAll);
    }
    __syncthreads();
    const int own = step < 0 ? 0 : warp * 16;
    const Number *keys = step < 0 ? at.query : stages.at(step), *values = pitch.inside || step < 0 ? keys : keys + kRows * pitch.key;
    float scores[2][4] = {};
    if (own < count) sums.score(at.query, keys + own * pitch.key, pitch.key, step < 0 ? sums.kBoth : n.key_dim, scores);
    if constexpr (kInt8) sums.weigh(at, scores, from + own, first, end, stages.weighing(own));
    else sums.weigh(at, scores, from + own, first, end, Alike{scale});
    __syncthreads();
    if (sums.first_channel() < n.value_dim) sums.add(at, values, pitch.value, count);
    __syncthreads();
    if (!kInt8 && step >= 0) load(step + kStages, Copied::kAll);
  }
  sums.write(n, at, out, (all_queries + these.first) * n.parts + part, these.last + 1 - these.first);
}

template <typename C, int kWarps, int kPairs>
cudaError_t launch(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, int most_shared, cudaStream_t stream) {
  const size_t bytes = Block<C, kWarps>::bytes(Pitches(n, Block<C, kWarps>::kRows));
  if constexpr (kWarps > 2)
    if (bytes > size_t(most_shared)) return launch<C, kWarps / 2, kPairs * 2>(a, n, w, most_shared, stream);
  const dim3 blocks(n.parts, ceil_div(n.queries(), kQueries) * n.groups, n.batch);
  return launch_kernel(attend_few_rows<C, kWarps, kPairs>, blocks, kWarps * 32, bytes, stream, n,
                       static_cast<const CacheNumber<C>*>(w.queries), AllRows<C>(a), a.past_len, w.parts);
}

}  // namespace

template <typename C>
cudaError_t attend_few(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, cudaStream_t stream) {
  int most_shared;
  const cudaError_t error = most_shared_bytes(&most_shared);
  if (error != cudaSuccess) return error;
  if (n.value_dim <= 64) return launch<C, 4, 1>(a, n, w, most_shared, stream);
  if (n.value_dim <= 128) return launch<C, 8, 1>(a, n, w, most_shared, stream);
  return n.value_dim <= 256 ? launch<C, 8, 2>(a, n, w, most_shared, stream) : launch<C, 8, 4>(a, n, w, most_shared, stream);
}

template cudaError_t attend_few<__half>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t attend_few<__nv_bfloat16>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t attend_few<int8_t>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);

}  // namespace mythos::cuda
