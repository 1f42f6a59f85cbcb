// Attention of many queries, of several tokens: a block's queries share the rows that it reads.
#include "attention_int8.cuh"
#include "launch.cuh"

namespace mythos::cuda {
namespace {

constexpr int kRows = 64;  // of a stage
constexpr int kKeys = 32;  // of a step
constexpr int kStages = 2;

template <typename C, int kWarps>
using Ring = StagesOf<C, kRows, kKeys, kWarps, kStages>;

// Blocks: (P, kWarps / kSharers sixteens of a group's queries, B G); the last queries, which see most, come first. kSharers warps
// have the same queries, and share the channels of the values out among themselves.
template <typename C, int kPieces, int kSharers, int kWarps>
__global__ void __launch_bounds__(kWarps * 32)
    attend_many_rows(Shape n, const CacheNumber<C>* queries, AllRows<C> cache, const int64_t* past_len, Partial out) {
  using Number = CacheNumber<C>;
  constexpr bool kInt8 = std::is_same_v<C, int8_t>;
  constexpr int kThreads = kWarps * 32, kBlockQueries = kQueries * kWarps / kSharers;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ uint64_t barriers[kStages];
  const Pitches pitch(n, kRows);
  const int sequence = blockIdx.z / n.groups, group = blockIdx.z % n.groups, part = blockIdx.x;
  const int block_query = (gridDim.y - 1 - blockIdx.y) * kBlockQueries, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int last_query = min(block_query + kBlockQueries, n.queries()) - 1, sharer = warp % kSharers;
  const int first_query = block_query + warp / kSharers * kQueries;  // of this warp
  const int64_t all_queries = (int64_t(sequence) * n.groups + group) * n.queries();  // in front of this sequence and group
  Number* query = reinterpret_cast<Number*>(memory);                 // [kBlockQueries, X]
  const Ring<C, kWarps> stages(query + kBlockQueries * pitch.key, pitch, barriers);
  wait_for_previous();
  const Rows<C> rows(n, cache.past, cache.fresh, past_len[sequence], sequence);
  const Scales<C> scales(n, cache, past_len[sequence], sequence);
  const Range range(n, rows, block_query / n.heads, last_query / n.heads, part, kRows);
  copy_queries(n, queries + all_queries * n.key_dim, block_query, kBlockQueries, pitch.key, query, kThreads);
  int first[2], end[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int s = min(first_query + lane / 4 + half * 8, last_query) / n.heads;
    first[half] = rows.first_seen(n, s), end[half] = min(rows.end_seen(s), range.to);
  }
  const int warp_first = rows.first_seen(n, min(first_query, last_query) / n.heads);
  const int warp_end = min(rows.end_seen(min(first_query + kQueries - 1, last_query) / n.heads), range.to);
  const int pieces = n.value_dim / kPiece / kSharers, first_channel = sharer * pieces * kPiece;
  const float scale = n.scale * kLog2E;
  const Number* own_query = query + warp / kSharers * kQueries * pitch.key;
  Flash<Number, kPieces, kKeys> flash;
#pragma unroll 1
  for (int load = range.from, step = -1; load < range.to + kRows; load += kRows, ++step) {
    if (load < range.to) {
      if constexpr (kInt8) stages.load(n, rows, scales, group, load, min(load + kRows, range.to), step + 1);
      else stages.load(n, rows, group, load, min(load + kRows, range.to), step + 1);
    }
    commit();
    if (step < 0) continue;
    stages.wait(step);
    const int from = load - kRows;
    if constexpr (kInt8) stages.widen(n, step, range.to - from, scale);
    __syncthreads();
    const Number *keys = stages.at(step), *values = (pitch.inside ? keys : keys + kRows * pitch.key) + first_channel;
#pragma unroll 1
    for (int key = 0; key < kRows; key += kKeys) {
      if (from + key >= warp_end || from + key + kKeys <= warp_first) continue;  // none of these queries sees any
      const int at = from + key, seen_first[2] = {first[0] - at, first[1] - at}, seen_end[2] = {end[0] - at, end[1] - at};
      const auto weigh = [&] {
        if constexpr (kInt8) return stages.weighing(key);
        else return Alike{scale};
      }();
      flash.step(own_query, keys + key * pitch.key, values + key * pitch.value, pitch, n.key_dim, pieces, weigh, seen_first, seen_end);
    }
    __syncthreads();
  }
  wait_but<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int of_sequence = first_query + lane / 4 + half * 8;
    const float total = flash.total_of(half);
    if (of_sequence > last_query) continue;
    const int64_t at = (all_queries + of_sequence) * n.parts + part;
    float* to = out.sums + at * n.value_dim + first_channel + lane % 4 * 2;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
      if (piece < pieces) *reinterpret_cast<float2*>(to + piece * 8) = {flash.sum[piece][2 * half], flash.sum[piece][2 * half + 1]};
    if (lane % 4 == 0 && sharer == 0) out.states[2 * at] = flash.largest[half], out.states[2 * at + 1] = total;
  }
}

template <typename C, int kPieces, int kSharers, int kWarps>
cudaError_t launch(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, int most_shared, cudaStream_t stream) {
  constexpr int kBlockQueries = kQueries * kWarps / kSharers;
  const Pitches pitch(n, kRows);
  const size_t bytes = kBlockQueries * pitch.key * sizeof(CacheNumber<C>) + Ring<C, kWarps>::bytes(pitch);
  if constexpr (kWarps > 2)
    if (bytes > size_t(most_shared)) return launch<C, kPieces, kSharers, kWarps / 2>(a, n, w, most_shared, stream);
  const dim3 blocks(n.parts, ceil_div(n.queries(), kBlockQueries), n.batch * n.groups);
  return launch_kernel(attend_many_rows<C, kPieces, kSharers, kWarps>, blocks, kWarps * 32, bytes, stream, n,
                       static_cast<const CacheNumber<C>*>(w.queries), AllRows<C>(a), a.past_len, w.parts);
}

}  // namespace

template <typename C>
cudaError_t attend_many(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, cudaStream_t stream) {
  int most_shared;
  const cudaError_t error = most_shared_bytes(&most_shared);
  if (error != cudaSuccess) return error;
  if (n.value_dim <= 64) return launch<C, 8, 1, 8>(a, n, w, most_shared, stream);
  if (n.value_dim <= 128) return launch<C, 16, 1, 8>(a, n, w, most_shared, stream);
  if (n.value_dim <= 256) return launch<C, 32, 1, 8>(a, n, w, most_shared, stream);
  return launch<C, 32, 2, 8>(a, n, w, most_shared, stream);
}

template cudaError_t attend_many<__half>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t attend_many<__nv_bfloat16>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t attend_many<int8_t>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);

}  // namespace mythos::cuda
