// Attention of few queries over many latent rows, on compute capability 9.0 (wgmma, code for sm_90a alone). One thread has tiles of 64 rows
// copied, by a tensor map; four times four warps multiply: some of the fours score a tile each, its rows on the left side (scores^T =
// rows . queries^T), then all of them add the tiles' values, each four to channels of its own (sums^T = values^T . weights^T).
#include "attention_flash.cuh"
#include "latent_tiles.cuh"
#include "launch.cuh"

namespace mythos::cuda {
namespace {

constexpr int kThreads = kMultiplying + 32;
constexpr size_t kMostBytes = 216 * 1024;  // small kernels before and after start beside it

// What a thread of the multiplying ones has: of queries query(0) to query(3), and of its four's channels in kTiles tiles of 64.
template <typename C, int kTiles>
struct Mixer {
  static constexpr const C* kType = nullptr;
  const Shape& n;
  const Places& at;
  int four, warp, lane;        // four: which; warp: of it
  float sum[kTiles][2][4];
  float scores[2][4];          // of rows row(0) and row(1) of a tile, then their weights
  float largest[4], total[4];  // largest: in units of ln 2; total: of the rows that this thread weighed

  __device__ __forceinline__ Mixer(const Shape& shape, const Places& places)
      : n(shape), at(places), four(__shfl_sync(0xffffffffu, threadIdx.x / kThreadsOfFour, 0)), warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32) {}
  __device__ __forceinline__ int query(int i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  __device__ __forceinline__ int row(int half) const { return warp * 16 + lane / 4 + half * 8; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i] = -FLT_MAX, total[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0.0f;
    if (threadIdx.x < kQueries) store_shared(at.largest + threadIdx.x * 4, ordered(__float_as_int(-FLT_MAX)));
  }
  // Keeps the compiler from using sums on the other side of this point.
  __device__ __forceinline__ void hold_sums() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) hold(sum[i]);
  }

  // A thread's four numbers among sixteen.
  __device__ __forceinline__ void load_four(float (&to)[4], uint32_t from) const {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(from + lane % 4 * 16)
                 : "memory");
  }
  // Where among sixteen what reduced() gives a lane belongs, and whether it is the lane to use it.
  __device__ __forceinline__ uint32_t offset() const { return lane % 4 * 16 + lane / 8 * 4; }
  __device__ __forceinline__ bool is_one() const { return lane / 4 % 2 == 0; }
  // One of the four numbers that each thread has, reduced over the warp's threads of the same queries.
  template <typename Reduce>
  __device__ __forceinline__ float reduced(const float (&values)[4], const Reduce& reduce) const {
    const bool upper = lane & 16, odd = lane & 8;
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      pair[i] = reduce(upper ? values[i + 2] : values[i], __shfl_xor_sync(0xffffffffu, upper ? values[i] : values[i + 2], 16));
    const float value = reduce(odd ? pair[1] : pair[0], __shfl_xor_sync(0xffffffffu, odd ? pair[0] : pair[1], 8));
    return reduce(value, __shfl_xor_sync(0xffffffffu, value, 4));
  }

  __device__ __forceinline__ void score(uint32_t tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] = 0.0f;
    hold(scores);
    uint64_t a = describe_rows(tile), b = describe_rows(at.queries);
#pragma unroll 1
    for (int chunk = 0; chunk < n.key_dim / kChunk; ++chunk, a += kChunkBytes >> 4, b += kQueryBytes >> 4) {
      begin_products();
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) multiply_rows(scores, a + i * 2, b + i * 2, kType);
    }
#pragma unroll 1
    for (int i = 0; i < n.key_dim % kChunk / 16; ++i, a += 2, b += 2) {
      begin_products();
      multiply_rows(scores, a, b, kType);
    }
    commit_products();
    wait_products_but<0>();
    hold(scores);
  }

  // Leaves out rows that queries do not see: each sees `seen` from `first` on. Those and the tile's first row count from the part's first.
  __device__ __forceinline__ void mask(const int (&first)[4], const int (&seen)[4], int tile_row) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int own = i / 4 * 2 + i % 2;
      if (uint32_t(tile_row + row(i / 2 % 2) - first[own]) >= uint32_t(seen[own])) scores[i / 4][i % 4] = -FLT_MAX;
    }
  }

  // Tells all of the largest scores.
  __device__ __forceinline__ void tell_largest() {
    float most[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) most[i] = fmaxf(scores[i / 2][i % 2], scores[i / 2][i % 2 + 2]);
    const float own = reduced(most, [](float a, float b) { return fmaxf(a, b); });
    if (is_one()) asm volatile("red.shared.max.s32 [%0], %1;" ::"r"(at.largest + offset()), "r"(ordered(__float_as_int(own))) : "memory");
  }

  // Sums so far become relative to the largest score so far. scale: of scores, into units of ln 2.
  __device__ __forceinline__ void rescale(float scale) {
    float most[4];
    load_four(most, at.largest);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      most[i] = fmaxf(__int_as_float(ordered(__float_as_int(most[i]))) * scale, -FLT_MAX);
      const float factor = power_of_two(largest[i] - most[i]);
      largest[i] = most[i], total[i] *= factor;
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) sum[j / 2][i / 2][i % 2 + j % 2 * 2] *= factor;
    }
  }

  // Scores become weights. Where no row is seen so far, none has any.
  __device__ __forceinline__ void weigh(uint32_t weights, float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float base = largest[i] == -FLT_MAX ? 0.0f : largest[i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& value = scores[i / 2][i % 2 + half * 2];
        value = power_of_two(fmaf(value, scale, -base));
        total[i] += value;
      }
    }
    const uint32_t to = weights + warp * 512 + lane / 4 * 16 + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_shared(to + i % 2 * 256 + i / 2 * 128, packed(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1], kType));
    show_copies();
  }

  // Begins to add a tile's values.
  __device__ __forceinline__ void add(uint32_t tile, uint32_t weights) {
    const uint64_t b = describe_weights(weights);
    uint64_t a[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) a[i] = describe_rows(tile + min(four + i * kFours, at.layout.chunks - 1) * kChunkBytes);
    begin_products();
#pragma unroll
    for (int row = 0; row < kRows; row += 16)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) multiply_columns(sum[i], a[i] + (row * kChunk * 2 >> 4), b + (row * kQueries * 2 >> 4), kType);
  }

  // Hands the part on, of the first `count` queries; `to`: the first of them, times P plus the part.
  __device__ __forceinline__ void write(const Partial& out, int64_t to, int count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const its = out.sums + (to + int64_t(query(i)) * n.parts) * n.value_dim;
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        const int channel = (four + j / 2 * kFours) * kChunk + row(j % 2);
        if (query(i) < count && channel < n.value_dim) its[channel] = sum[j / 2][i / 2][i % 2 + j % 2 * 2];
      }
    }
    const float own = reduced(total, [](float a, float b) { return a + b; });
    if (is_one()) store_shared(at.of_warps + threadIdx.x / 32 * kQueries * 4 + offset(), __float_as_int(own));
    meet_multiplying();
    if (threadIdx.x >= 4) return;
    float all[4] = {};
#pragma unroll 4
    for (int w = 0; w < kMultiplying / 32; ++w) {
      float of_warp[4];
      load_four(of_warp, at.of_warps + w * kQueries * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) all[i] += of_warp[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (query(i) < count) *reinterpret_cast<float2*>(out.states + 2 * (to + int64_t(query(i)) * n.parts)) = {largest[i], all[i]};
  }
};

// A part's rows, as the multiplying threads see them.
template <typename C>
struct Part {
  Rows<C> rows;
  int first_row, count, tiles;  // tiles: of a step, all that there are, or what can be while another one is copied
  int all_first, all_end;       // rows that all queries see, and which a thread's queries see, from first_row on
  int first[4], seen[4];

  template <typename Query>
  __device__ __forceinline__ Part(const Shape& n, const Layout& layout, const AllRows<C>& cache, int64_t length, int sequence,
                                  const int (&tokens)[2], const Query& query)
      : rows(n, cache.past, cache.fresh, length, sequence) {
    const Range range(n, rows, tokens[0], tokens[1], blockIdx.x, kUnitRows);
    first_row = range.from, count = __shfl_sync(0xffffffffu, range.to - range.from, 0);
    tiles = min(kFours, layout.stages - (count > layout.stages * kRows));
    all_first = rows.first_seen(n, tokens[1]) - first_row, all_end = min(rows.end_seen(tokens[0]) - first_row, count);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = layout.token_of(query(i));
      first[i] = max(rows.first_seen(n, token) - first_row, 0), seen[i] = max(min(rows.end_seen(token) - first_row, count) - first[i], 0);
    }
  }
  __device__ __forceinline__ bool is_seen_by_all(int tile_row) const { return tile_row >= all_first && tile_row + kRows <= all_end; }
  // How many of a tile's rows copies bring.
  __device__ __forceinline__ int copied(int tile_row) const {
    const int here = first_row + tile_row;
    return min(here < rows.cached ? rows.together(here) : 0, count - tile_row);
  }
};

// Rows of a tile that no copy brings: new ones, those where the cache begins anew, and zeros for those that do not exist, which are read
// with weights of zero. A four does it.
template <typename C>
__device__ __forceinline__ void fill_tile(const Shape& n, const Part<C>& part, uint32_t tile, int tile_row, int four) {
  const int first = part.first_row + tile_row, end = part.first_row + part.count;
#pragma unroll 1
  for (int row = part.copied(tile_row) + threadIdx.x / 32 % 4; row < kRows; row += 4)
#pragma unroll 1
    for (int piece = threadIdx.x % 32; piece < n.key_dim / kPiece; piece += 32)
      copy_piece(place_of(tile, kChunkBytes, row, piece), part.rows[min(first + row, end - 1)] + piece * kPiece, first + row < end);
  commit();
  wait_but<0>();
  show_copies();
  meet_four(four);
}

// Scores a step's tile, by a four. dry: with what is in memory.
template <typename C, int kTiles>
__device__ __forceinline__ void score_tile(const Part<C>& part, Mixer<C, kTiles>& mixer, const Turn& turn, int tile_row, bool dry) {
  const Places& at = mixer.at;
  const uint32_t tile = at.tile(turn.stage);
  if (!dry) {
    if (mixer.lane < kUnits) at.full(turn.stage, mixer.lane).wait(turn.round);
    __syncwarp();
    if (part.copied(tile_row) < kRows) fill_tile(mixer.n, part, tile, tile_row, mixer.four);
  }
  mixer.score(tile);
  if (!part.is_seen_by_all(tile_row)) mixer.mask(part.first, part.seen, tile_row);
  mixer.tell_largest();
}

// Adds the values of a step's tiles.
template <typename C, int kTiles>
__device__ __forceinline__ void add_tiles(Mixer<C, kTiles>& mixer, Turn turn, int tiles) {
  const Places& at = mixer.at;
  mixer.hold_sums();
#pragma unroll 1
  for (int i = 0; i < tiles; ++i, turn.next(at.layout.stages)) mixer.add(at.tile(turn.stage), at.weights_of(turn.stage));
  commit_products();
  wait_products_but<0>();
  mixer.hold_sums();
}

// Waits for the kernels before, and begins to copy their queries. Returns this call's length, which the copying thread gets as well.
template <typename C>
__device__ __forceinline__ int64_t open(const Shape& n, const Places& at, const C* queries, int first, int last, const int64_t* past_len,
                                        volatile int64_t* now) {
  wait_for_previous();
  const int64_t length = *past_len;
  const int own = threadIdx.x / 32;
  const C* from = queries + int64_t(min(first + own, last)) * n.key_dim;
#pragma unroll 1
  for (int piece = threadIdx.x % 32; piece < n.key_dim / kPiece; piece += 32)
    copy_piece(place_of(at.queries, kQueryBytes, own, piece), from + piece * kPiece, first + own <= last);
  commit();
  if (threadIdx.x == 0) *now = length, at.opened().arrive();
  return length;
}

// Few registers, as if blocks had so many threads: small kernels before and after this one run beside it.
template <int kTiles>
constexpr int kThreadsAsIf = kTiles == 1 ? 1024 : 896;

// Blocks: (P, sixteens of queries, B).
template <typename C, int kTiles>
__global__ void __launch_bounds__(kThreadsAsIf<kTiles>)
    attend_latents(const __grid_constant__ CUtensorMap map, Shape n, Layout layout, const C* queries, AllRows<C> cache, const int64_t* past_len,
                   Partial out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ uint64_t barriers[Places::kBarriers];
  __shared__ volatile int64_t length_before, length_now;
  const Places at(memory, barriers, layout);
  const int sequence = blockIdx.z, first_query = blockIdx.y * kQueries, last_query = min(first_query + kQueries, n.queries()) - 1;
  const int tokens[2] = {layout.token_of(first_query), layout.token_of(last_query)};
  const bool copies = __shfl_sync(0xffffffffu, threadIdx.x / kThreadsOfFour, 0) >= kFours;
  if (copies && threadIdx.x == kMultiplying) prepare_copies(&map, at, past_len + sequence, &length_before);
  let_next_start();
  __syncthreads();
  const int64_t before = length_before;
  if (copies) {
    if (threadIdx.x == kMultiplying) copy_tiles(&map, n, at, sequence, past_len, before, &length_now, tokens);
    return;
  }
  Mixer<C, kTiles> mixer(n, at);
  const int four = mixer.four;
  const float scale = n.scale * kLog2E;
  const auto part_of = [&](int64_t length) {
    return Part<C>(n, layout, cache, length, sequence, tokens, [&](int i) { return min(first_query + mixer.query(i), last_query); });
  };
  Part<C> part = part_of(before);
  Turn turn;
  // The first step computes with what is in memory by chance, and only brings the code near while other kernels run.
#pragma unroll 1
  for (int row = -1; row < part.count; row += part.tiles * kRows) {
    const bool dry = row < 0;
    const int tiles = dry ? 1 : min(part.tiles, ceil_div(part.count - row, kRows));
    if (four < tiles) score_tile(part, mixer, turn.ahead(four, layout.stages), row + four * kRows, dry);
    meet_multiplying();
    mixer.rescale(scale);
    if (four < tiles) mixer.weigh(at.weights_of(turn.ahead(four, layout.stages).stage), scale);
    meet_multiplying();
    add_tiles(mixer, turn, tiles);
    if (!dry) {
#pragma unroll 1
      for (int i = 0; i < tiles; ++i, turn.next(layout.stages)) at.empty(turn.stage).arrive_as_warp();
      continue;
    }
    mixer.clear();
    const int64_t now = open(n, at, queries + int64_t(sequence) * n.queries() * n.key_dim, first_query, last_query, past_len + sequence, &length_now);
    if (__any_sync(0xffffffffu, now != before)) {
      pass_over(at, min(layout.stages, ceil_div(part.count, kRows)), turn);
      part = part_of(now);
    }
    wait_but<0>();
    show_copies();
    meet_multiplying();
    row = -part.tiles * kRows;
  }
  mixer.write(out, (int64_t(sequence) * n.queries() + first_query) * n.parts + blockIdx.x, last_query + 1 - first_query);
#else
  __trap();  // the host chooses it nowhere else
#endif
}

// Describes all cached rows to copies.
template <typename C>
cudaError_t describe_cache(const mythos_cuda_attention& a, const Shape& n, CUtensorMap* map) {
  const cuuint64_t sizes[3] = {cuuint64_t(n.width), cuuint64_t(n.capacity), cuuint64_t(n.batch)};
  const cuuint64_t pitches[2] = {n.width * sizeof(C), uint64_t(n.capacity) * n.width * sizeof(C)};
  const cuuint32_t box[3] = {kChunk, kUnit, 1}, steps[3] = {1, 1, 1};
  constexpr auto type = std::is_same_v<C, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(tensor_map_encoder());
  const CUresult result = encode(map, type, 3, const_cast<void*>(a.past), sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

// Values of whole chunks, another tile beside the one that is computed with, and scores in the order of their weights.
bool takes_latents(const mythos_cuda_attention& a, const Shape& n) {
  return a.n_kv_heads == 0 && (a.cache_dtype == MYTHOS_CUDA_FLOAT16 || a.cache_dtype == MYTHOS_CUDA_BFLOAT16) && a.rank % kChunk == 0 &&
         a.scale > 0.0f && Layout(n, kMostBytes).stages >= 2 && has_wgmma() && tensor_map_encoder() != nullptr;
}

template <typename C>
cudaError_t attend_latents_few(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, cudaStream_t stream) {
  const Layout layout(n, kMostBytes);
  CUtensorMap map;
  const cudaError_t error = describe_cache<C>(a, n, &map);
  if (error != cudaSuccess) return error;
  const dim3 blocks(n.parts, ceil_div(n.queries(), kQueries), n.batch);
  const auto launch = [&](auto kernel) {
    return launch_kernel(kernel, blocks, kThreads, layout.bytes(), stream, map, n, layout, static_cast<const C*>(w.queries), AllRows<C>(a),
                         a.past_len, w.parts);
  };
  return n.value_dim <= kFours * kChunk ? launch(attend_latents<C, 1>) : launch(attend_latents<C, 2>);
}

template cudaError_t attend_latents_few<__half>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);
template cudaError_t attend_latents_few<__nv_bfloat16>(const mythos_cuda_attention&, const Shape&, const AttentionWorkspace&, cudaStream_t);

}  // namespace mythos::cuda
