// Online softmax over cached rows (arXiv 1805.02867, 2205.14135), for whatever keys and values the rows hold.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace mythos {

constexpr size_t kRowBlock = 64;   // most cached rows a step of the online softmax
constexpr size_t kTokenTile = 16;  // prefill: tokens of one head that pass over the rows together
constexpr size_t kHeadTile = 4;    // decode: heads of one token that do, where the cache is short

// RoPE (arXiv 2104.09864), pairs half a head apart: out may be in.
void Rotate(const float* in, const float* cos, const float* sin, size_t half, float* out);

// A run of rows of one sequence. Keys and values of the first group of heads start at these channels of a row, those of each
// next group `step` channels later. scales: of int8 rows, one a row.
struct Rows {
  CacheType type;
  const void* data;
  const float* scales;
  size_t width, keys_at, values_at, step, count;
  const char* row(size_t r) const { return static_cast<const char*>(data) + r * width * SizeOf(type); }
  Rows From(size_t first, size_t n) const {
    return {type, row(first), scales == nullptr ? nullptr : scales + first, width, keys_at, values_at, step, n};
  }
};

// Cached rows of one sequence in the order of their positions: those up to the ring's end, then those at its beginning.
struct Past {
  Rows rows, wrapped;
  Past(const Rows& rows) : rows(rows), wrapped(rows.From(0, 0)) {}
  Past(const Rows& rows, const Rows& wrapped) : rows(rows), wrapped(wrapped) {}
  size_t count() const { return rows.count + wrapped.count; }
  Past From(size_t first, size_t n) const {
    const size_t skipped = std::min(first, rows.count), here = std::min(n, rows.count - skipped);
    return {rows.From(skipped, here), wrapped.From(first - skipped, n - here)};
  }
};

// One layer's slot of the cache: [B, C, W], its scales [B, C]. The row of position p stands at p mod C.
struct Cache {
  CacheType type;
  const void* data;
  const float* scales;  // int8 only
  // The rows that there are of sequence b's past_len.
  Past Sequence(size_t b, size_t capacity, size_t width, size_t past_len, size_t keys_at, size_t values_at, size_t step) const {
    const Rows all = Rows{type, data, scales, width, keys_at, values_at, step, 0}.From(b * capacity, std::min(past_len, capacity));
    const size_t start = past_len <= capacity || capacity == 0 ? 0 : past_len % capacity;
    return {all.From(start, all.count - start), all.From(0, start)};
  }
};

// Where the rows of new tokens go: [T, W], their scales [T].
struct NewRows {
  CacheType type;
  void* data;
  float* scales;    // int8 only
  float row_scale;  // int8 only: of every row, larger numbers cut off; 0 for each row's own, its largest magnitude / 127
  // Stores row t and leaves in `row` what a reader of the cache will see.
  void Store(size_t t, float* row, size_t width, const Kernels& k) const;
};

// Queries [groups, m, key_dim]; query i of each group sees rows [from[i], to[i]). acc [groups, m, value_dim] and state
// [groups, m] go on from before.
struct Queries {
  const float* values;
  size_t groups, m, key_dim, value_dim;
  const size_t* from;
  const size_t* to;
  float* acc;
  SoftmaxRow* state;
};

// Nothing seen yet.
void Start(SoftmaxRow* state, float* acc, size_t m, size_t value_dim);

// Lets the queries see rows.
void Attend(const Queries& q, const Rows& rows, const Kernels& k);
void Attend(const Queries& q, const Past& past, const Kernels& k);

// How the work of one operator call is cut: prefill by tokens of one head, decode by heads of one token.
struct Cut {
  size_t tokens, heads, token_tiles, head_tiles;
  Cut(size_t seq, size_t n_heads);
};

// Decode over a long cache: its rows are cut into splits, which all heads that share the rows attend to at once.
struct Splits {
  size_t rows, most;
  // Only where each sequence has one new token and a cache of some length: any() tells.
  Splits(size_t seq, size_t batch, size_t capacity, const int64_t* past_len);
  bool any() const { return most > 0; }
};

// What decode attends with: one query a head, [batch, groups, m, key_dim].
struct DecodeShape {
  size_t batch, groups, m, key_dim, value_dim;
  size_t heads() const { return groups * m; }
};

// Attends to past rows split by split: rows_of(b) gives those of a sequence, first_of(b) the first that may be seen. Fills
// states [batch, groups, m] and acc [batch, groups, m, value_dim].
void AttendSplits(const Splits& splits, const DecodeShape& shape, const float* queries, const std::function<Past(size_t)>& rows_of,
                  const std::function<size_t(size_t)>& first_of, SoftmaxRow* states, float* acc, const Kernels& k,
                  const Parallel& parallel);

}  // namespace mythos
