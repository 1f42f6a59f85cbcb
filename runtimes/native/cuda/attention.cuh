// What the ways of attending share: the sizes, rows of a sequence, and parts that are put together.
//
// Rows of a sequence are numbered in the order of their positions: cached ones that there are, then the new ones. A group is the heads
// that share keys and values; its queries are its heads for every new token of a sequence, heads of a token side by side. Shape
// letters: T new tokens of all sequences, B batch, S new tokens of one, H n_heads, G groups, M heads of a group, X key and Y value dim
// of a row, P parts, W width of a row.
#pragma once

#include <cfloat>
#include <climits>

#include "experts.cuh"
#include "numbers.cuh"

namespace mythos::cuda {

struct Shape {
  int batch, seq, n_heads, groups, heads, key_dim, value_dim, capacity, width, window, parts;  // B, S, H, G, M, X, Y, C, W, P
  int keys_at, values_at, step;  // where a row's keys and values begin, and how far those of the next group are
  float scale;

  __host__ __device__ int queries() const { return seq * heads; }  // of a sequence and group
  bool has_many_parts() const { return parts >= 48; }  // of a long context: blocks on many multiprocessors, much to put together
  // Of the rows' scales, which lie as rows of one number do.
  __device__ __forceinline__ Shape of_scales() const {
    Shape n = *this;
    n.width = 1;
    return n;
  }
  // Where a head's query of a token is among all queries [B, G, S M].
  __device__ __forceinline__ int64_t query_of(int token, int head) const {
    if (groups == 1 || seq == 1) return int64_t(token) * n_heads + head;
    return ((int64_t(token / seq) * groups + head / heads) * seq + token % seq) * heads + head % heads;
  }
};

// What a cache's numbers are multiplied as on tensor cores.
template <typename C>
using CacheNumber = std::conditional_t<std::is_same_v<C, int8_t>, __half, C>;

// All sequences' rows, cached ones [B, C, W] and new ones [T, W]; of int8 ones the scales as well, [B, C] and [T].
template <typename C>
struct AllRows {
  const C *past, *fresh;

  explicit AllRows(const mythos_cuda_attention& a) : past(static_cast<const C*>(a.past)), fresh(static_cast<const C*>(a.new_kv)) {}
};
template <>
struct AllRows<int8_t> {
  const int8_t *past, *fresh;
  const float *past_scales, *fresh_scales;

  explicit AllRows(const mythos_cuda_attention& a)
      : past(static_cast<const int8_t*>(a.past)), fresh(static_cast<const int8_t*>(a.new_kv)), past_scales(a.past_scale),
        fresh_scales(a.new_scale) {}
};

// One sequence's rows.
template <typename C>
struct Rows {
  const C *past, *fresh;
  int64_t width;
  int cached, first, capacity;  // how many cached rows there are, where the oldest stands

  __device__ __forceinline__ Rows(const Shape& n, const C* all_past, const C* all_fresh)
      : past(all_past), fresh(all_fresh), width(n.width), cached(0), first(0), capacity(n.capacity) {}
  __device__ __forceinline__ Rows(const Shape& n, const C* all_past, const C* all_fresh, int64_t past_len, int sequence)
      : past(all_past + int64_t(sequence) * n.capacity * n.width), fresh(all_fresh + int64_t(sequence) * n.seq * n.width), width(n.width),
        capacity(n.capacity) {
    const int64_t length = max(past_len, int64_t(0));
    cached = int(min(length, int64_t(n.capacity)));
    first = length <= n.capacity ? 0 : int(uint32_t(length) % uint32_t(n.capacity));
  }
  __device__ __forceinline__ const C* operator[](int row) const {
    if (row >= cached) return fresh + (row - cached) * width;
    const int at = first + row;
    return past + (at < capacity ? at : at - capacity) * width;
  }
  // How many rows from this one on lie one behind the other.
  __device__ __forceinline__ int together(int row) const {
    if (row >= cached) return INT_MAX;
    const int at = first + row;
    return min(cached - row, (at < capacity ? capacity : 2 * capacity) - at);
  }
  // The first row that new token s sees, and the one behind its last.
  __device__ __forceinline__ int first_seen(const Shape& n, int s) const { return n.window > 0 ? max(0, cached + s + 1 - n.window) : 0; }
  __device__ __forceinline__ int end_seen(int s) const { return cached + s + 1; }
};

// Scales of one sequence's rows: 1 where they are not int8.
template <typename C>
struct Scales {
  __device__ __forceinline__ Scales(const Shape&, const AllRows<C>&, int64_t, int) {}
  __device__ __forceinline__ float operator[](int) const { return 1.0f; }
};
template <>
struct Scales<int8_t> {
  Rows<float> at;

  __device__ __forceinline__ Scales(const Shape& n, const AllRows<int8_t>& all, int64_t past_len, int sequence)
      : at(n.of_scales(), all.past_scales, all.fresh_scales, past_len, sequence) {}
  __device__ __forceinline__ float operator[](int row) const { return *at[row]; }
};

// The rows that part `part` of P has of all that new tokens s to t see, whole `unit`s.
struct Range {
  int from, to;

  template <typename C>
  __device__ __forceinline__ Range(const Shape& n, const Rows<C>& rows, int s, int t, int part, int unit) {
    const int first = rows.first_seen(n, s), last = rows.end_seen(t);
    const int each = ((last - first + n.parts - 1) / n.parts + unit - 1) / unit * unit;
    from = min(first + part * each, last);
    to = min(from + each, last);
  }
};

// What a part of the rows gives each query: sums [B G S M, P, Y] of values weighed by 2^(score - largest), and largest and the
// weights' sum [B G S M, P, 2]. Scores are in units of ln 2; any number near the largest does for it.
struct Partial {
  float *sums, *states;
};

constexpr int kMostParts = 132;  // a block for each of a large GPU's multiprocessors
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float2 rotated(float first, float second, float cosine, float sine) {
  return {first * cosine - second * sine, second * cosine + first * sine};
}

struct AttentionWorkspace {
  void* queries;   // [B, G, S M, X], as the cache's numbers are multiplied, or float32
  Partial parts;
  void* rounded;   // [T, H, max(N, Y)] of w_uk's dtype, where there are many tokens
};

// Which kernels run: they all follow from the sizes.
struct Ways {
  bool tensor_cores;  // keys of whole sixteens; else float32 on any sizes
  bool many_queries;  // blocks of queries of several tokens share the rows they read
  bool many_tokens;   // latent attention's products with w_uk and w_uv are tiles
  bool wide_tiles;    // few queries of latents are compared with 64 rows at a time (wgmma)
};
Ways ways_of(const mythos_cuda_attention& a, const Shape& n);

template <typename W, typename C>
cudaError_t make_queries(const mythos_cuda_attention& a, const Shape& n, const Ways& ways, const AttentionWorkspace& w, cudaStream_t stream);

template <typename C>
cudaError_t attend_few(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, cudaStream_t stream);
// Whether the device and the sizes allow attend_latents_few(), for fewer than 64 queries.
bool takes_latents(const mythos_cuda_attention& a, const Shape& n);
template <typename C>
cudaError_t attend_latents_few(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, cudaStream_t stream);
template <typename C>
cudaError_t attend_many(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, cudaStream_t stream);
template <typename C>
cudaError_t attend_plainly(const mythos_cuda_attention& a, const Shape& n, const AttentionWorkspace& w, cudaStream_t stream);

template <typename W>
cudaError_t put_together(const mythos_cuda_attention& a, const Shape& n, const Ways& ways, const AttentionWorkspace& w, cudaStream_t stream);

}  // namespace mythos::cuda
