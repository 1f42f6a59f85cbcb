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
  float* numbers;                    // [kWarps, kQueries]

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

// Asks for the first kCount rows of a part, shared out among the blocks that read them. The length may not be this call's yet: then
// rows are asked for that are not read.
template <int kCount, typename C>
__device__ __forceinline__ void prefetch_rows(const Shape& n, const Rows<C>& rows, int first_token, int last_token, int part) {
  const Range range(n, rows, first_token, last_token, part, 16);
  const int first = rows.first + range.from, at = first < n.capacity ? first : first - n.capacity;
  const int count = min(min(range.to, rows.cached) - range.from, min(kCount, n.capacity - at));
  if (count > 0) prefetch_share(rows.past + at * rows.width, count * rows.width * sizeof(C), blockIdx.y, gridDim.y);
}

// Blocks: (P, sixteens of a group's queries times G, B). kPairs: pairs of eight channels that a warp sums. Code is kept short: each
// launch reads it from memory, and runs most of it once.
template <typename C, int kWarps, int kPairs>
__global__ void __launch_bounds__(kWarps * 32)
    attend_few_rows(Shape n, const CacheNumber<C>* queries, AllRows<C> cache, const int64_t* past_len, Partial out) {
  using Memory = Block<C, kWarps>;
  using Number = CacheNumber<C>;
  constexpr int kRows = Memory::kRows;
  constexpr const Number* kType = nullptr;
  // Int8 rows leave their stage before they are read, so that more steps are on their way.
  constexpr bool kInt8 = std::is_same_v<C, int8_t>;
  constexpr int kAhead = kInt8 ? kStages : 1;
  // The first step's cached rows are copied before the wait. Not of more than 256 channels: eight sequences of 32 768 such rows did not
  // return on an H100, and nobody knows yet whether this is why.
  constexpr bool kEarly = !kInt8 && kPairs <= 2;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ uint64_t barriers[kStages];
  const Pitches pitch(n, kRows);
  const Memory at(memory, pitch);
  const int sequence = blockIdx.z, part = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int group = blockIdx.y, first_query = 0;
  while (group >= n.groups) group -= n.groups, first_query += kQueries;
  const auto token_of = [&](int query) {
    int s = 0;
    while (query >= n.heads) query -= n.heads, ++s;
    return s;
  };
  const int last_query = min(first_query + kQueries, n.queries()) - 1, first_token = token_of(first_query), last_token = token_of(last_query);
  const int64_t all_queries = (int64_t(sequence) * n.groups + group) * n.queries();  // in front of this sequence and group
  const typename Memory::Ring stages(at.stages, pitch, barriers);
  Rows<C> rows(n, cache.past, cache.fresh);
  Scales<C> scales(n, cache, 0, sequence);
  int first_row = 0, end_row = kRows, first[2] = {0, 0}, end[2] = {kRows, kRows};  // of the part; that this thread's two queries see
  const int first_channel = warp * kPairs * 16;
  const float scale = n.scale * kLog2E;
  float sum[kPairs][2][4], largest[2], total[2];
  const auto begin = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half) largest[half] = -FLT_MAX, total[half] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs * 8; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0.0f;
  };
  int turn = 0;  // of the ring's steps, this kernel's step 0
  const auto load = [&](int step, Copied copied) {
    const int from = first_row + step * kRows, to = min(from + kRows, end_row);
    if (from >= end_row) return;
    if constexpr (kInt8) stages.load(n, rows, scales, group, from, to, step);
    else stages.load(n, rows, group, from, to, turn + step, copied);
  };
  const auto find_rows = [&](int64_t length) {
    rows = Rows<C>(n, cache.past, cache.fresh, length, sequence), scales = Scales<C>(n, cache, length, sequence);
    const Range range(n, rows, first_token, last_token, part, 16);
    first_row = range.from, end_row = range.to;
  };
  let_next_start();
  // A length is written behind the rows that it counts: where it is this call's already, they are there.
  const int64_t length = load_acquired(past_len + sequence);
  if constexpr (kEarly) find_rows(length), load(0, Copied::kCached);
  prefetch_rows<kStages * kRows>(n, Rows<C>(n, cache.past, cache.fresh, length, sequence), first_token, last_token, part);
  if constexpr (kInt8) prefetch_rows<kStages * kRows>(n, Scales<C>(n, cache, length, sequence).at, first_token, last_token, part);
  // The first step computes with what is in memory by chance, and only brings the code near while other kernels run; those up to -1 load.
#pragma unroll 1
  for (int step = -1 - kAhead;; ++step) {
    if (step == -1 - kAhead || step == -kAhead) begin();
    if (step == -kAhead) {
      wait_for_previous();
      const int64_t now = past_len[sequence];
      copy_queries(n, queries + all_queries * n.key_dim, first_query, kQueries, pitch.key, at.query, kWarps * 32);
      if constexpr (kEarly) {
        load(0, Copied::kFresh);
        if (now != length) {
          if (first_row < end_row) {  // the ring begins a second turn
            stages.wait(0), turn = kStages;
            for (int skipped = 1; skipped < kStages; ++skipped) stages.skip(skipped);
          }
          stages.settle();
          __syncthreads();
          find_rows(now), load(0, Copied::kAll);
        }
      } else {
        find_rows(now);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int s = last_token == first_token ? first_token : token_of(min(first_query + lane / 4 + half * 8, last_query));
        first[half] = rows.first_seen(n, s), end[half] = min(rows.end_seen(s), end_row);
      }
    }
    const int from = first_row + max(step, 0) * kRows;
    if constexpr (kInt8) {
      if (step >= 0) {
        if (from >= end_row) break;
        stages.wait(step);
      }
      if (step >= 0 || step < -kAhead) stages.widen(n, max(step, 0), end_row - from, scale);
    }
    if (step >= -kAhead) {
      if (!kEarly || step >= 0) load(step + kAhead, Copied::kAll);
      commit();
      if (step < 0) continue;
      if constexpr (!kInt8) {
        if (from >= end_row) break;
        stages.wait(turn + step);
      }
    }
    __syncthreads();
    const int own = from + warp * 16;
    const Number *keys = stages.at(step < 0 ? 1 : step), *values = pitch.inside ? keys : keys + kRows * pitch.key;
    const auto weigh = [&] {
      if constexpr (kInt8) return stages.weighing(warp * 16);
      else return Alike{scale};
    }();
    float score[2][4] = {}, other[2][4] = {};  // of every second sixteen channels each: sums do not wait for one another
    if (own < end_row) {
      const Number* a_row = at.query + lane % 16 * pitch.key + lane / 16 * 8;
      const Number* b_row = keys + (warp * 16 + lane % 8 + lane / 16 * 8) * pitch.key + lane / 8 % 2 * 8;
      const auto add = [&](float (&to)[2][4], int k) {
        uint32_t a[4], b[4];
        load_matrices(a, shared_address(a_row + k));
        load_matrices(b, shared_address(b_row + k));
        multiply(to[0], a, b[0], b[1], kType);
        multiply(to[1], a, b[2], b[3], kType);
      };
      int k = 0;
#pragma unroll 1
      for (; k + 16 < n.key_dim; k += 32) add(score, k), add(other, k + 16);
      if (k < n.key_dim) add(score, k);
    }
    float most[2] = {-FLT_MAX, -FLT_MAX};
    const auto row_of = [&](int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; };  // of this warp's
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = own + row_of(i), half = i % 4 / 2;
      float& value = score[i / 4][i % 4];
      value += other[i / 4][i % 4];
      value = row >= first[half] && row < end[half] ? weigh(value, row_of(i)) : -FLT_MAX;
      most[half] = fmaxf(most[half], value);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int distance = 2; distance > 0; distance /= 2) most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], distance));
      if (lane % 4 == 0) at.numbers[warp * kQueries + lane / 4 + half * 8] = most[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = largest[half];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) most[half] = fmaxf(most[half], at.numbers[w * kQueries + lane / 4 + half * 8]);
      const float factor = power_of_two(largest[half] - most[half]);
      largest[half] = most[half], total[half] *= factor;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[pair][i / 2][half * 2 + i % 2] *= factor;
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int half = i % 4 / 2;
      float weight[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float value = score[i / 4][i % 4 + j], exponent = value - most[half];
        const bool seen = value != -FLT_MAX;
        weight[j] = seen ? power_of_two(exponent) : 0.0f;
        total[half] += weigh.share(weight[j], exponent, row_of(i + j), seen);
      }
      *reinterpret_cast<uint32_t*>(at.weights + (lane / 4 + half * 8) * Memory::kWeightPitch + warp * 16 + i / 4 * 8 + lane % 4 * 2) =
          packed(weight[0], weight[1], kType);
    }
    __syncthreads();
    if (first_channel < n.value_dim) {
      const Number* a_row = at.weights + lane % 16 * Memory::kWeightPitch + lane / 16 * 8;
      const Number* b_row = values + lane % 16 * pitch.value + first_channel + lane / 16 * 8;
#pragma unroll 1
      for (int k = 0; k < min(kRows, end_row - from); k += 16) {
        uint32_t a[4];
        load_matrices(a, shared_address(a_row + k));
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          uint32_t b[4];
          load_transposed(b, shared_address(b_row + k * pitch.value + pair * 16));
          multiply(sum[pair][0], a, b[0], b[1], kType);
          multiply(sum[pair][1], a, b[2], b[3], kType);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int distance = 2; distance > 0; distance /= 2) total[half] += __shfl_xor_sync(0xffffffffu, total[half], distance);
    if (lane % 4 == 0) at.numbers[warp * kQueries + lane / 4 + half * 8] = total[half];
    const int query = first_query + lane / 4 + half * 8;
    float* to = out.sums + ((all_queries + query) * n.parts + part) * n.value_dim + first_channel + lane % 4 * 2;
    if (query <= last_query)
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i)
        if (first_channel + i * 8 < n.value_dim)
          *reinterpret_cast<float2*>(to + i * 8) = {sum[i / 2][i % 2][half * 2], sum[i / 2][i % 2][half * 2 + 1]};
  }
  __syncthreads();
  if (warp == 0 && lane % 4 == 0)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + lane / 4 + half * 8;
      float all = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all += at.numbers[w * kQueries + lane / 4 + half * 8];
      if (query <= last_query) *reinterpret_cast<float2*>(out.states + 2 * ((all_queries + query) * n.parts + part)) = {largest[half], all};
    }
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
