// Both attention operators: new rows first, then blocks of cached rows with online softmax, each row read where it lies.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "operators.h"
#include "scratch.h"

namespace mythos {
namespace {

constexpr size_t kRowBlock = 64;    // cached rows a step of the online softmax
constexpr size_t kTokenTile = 16;   // prefill: tokens of one head that pass over the rows together
constexpr size_t kHeadsATask = 4;   // decode: heads of one token that do

// RoPE (arXiv 2104.09864), pairs half a head apart: out may be in.
void Rotate(const float* in, const float* cos, const float* sin, size_t half, float* out) {
  for (size_t i = 0; i < half; ++i) {
    const float first = in[i], second = in[i + half];
    out[i] = first * cos[i] - second * sin[i];
    out[i + half] = second * cos[i] + first * sin[i];
  }
}

// A run of rows to attend to: keys and values of row j at j * stride.
struct Rows {
  const float* keys;
  const float* values;
  size_t stride;
  size_t count;
};

// m queries [m, key_dim] over rows; query i sees the first visible[i] of them. acc [m, value_dim], state [m] go on from before.
struct Tile {
  const float* queries;
  size_t m, key_dim, value_dim;
  const size_t* visible;
  float* scores;  // [m, kRowBlock]
  float* acc;
  SoftmaxRow* state;
};

void Attend(const Tile& t, const Rows& rows, const Kernels& k) {
  const size_t deepest = *std::max_element(t.visible, t.visible + t.m);
  const size_t count = std::min(rows.count, deepest);
  for (size_t start = 0; start < count; start += kRowBlock) {
    const size_t n = std::min(kRowBlock, count - start);
    k.matmul_nt(t.queries, t.key_dim, t.m, rows.keys + start * rows.stride, rows.stride, n, t.key_dim, t.scores, kRowBlock);
    for (size_t i = 0; i < t.m; ++i) {
      float* scores = t.scores + i * kRowBlock;
      const size_t seen = t.visible[i] <= start ? 0 : std::min(n, t.visible[i] - start);
      if (seen > 0) {
        const float correction = k.online_softmax(scores, seen, &t.state[i]);
        if (correction != 1.0f) k.scale(t.acc + i * t.value_dim, correction, t.value_dim);
      }
      std::fill(scores + seen, scores + n, 0.0f);
    }
    k.matmul_nn(t.scores, kRowBlock, t.m, rows.values + start * rows.stride, rows.stride, n, t.value_dim, t.acc, t.value_dim);
  }
}

void Start(SoftmaxRow* state, float* acc, size_t m, size_t value_dim) {
  std::fill(acc, acc + m * value_dim, 0.0f);
  for (size_t i = 0; i < m; ++i) state[i] = {-std::numeric_limits<float>::max(), 0.0f};
}

// How the work of one operator call is cut: decode by heads, prefill by tokens of one head.
struct Cut {
  size_t tokens, heads, token_tiles, head_tiles;
  Cut(size_t seq, size_t n_heads)
      : tokens(seq == 1 ? 1 : std::min(seq, kTokenTile)),
        heads(seq == 1 ? std::min(n_heads, kHeadsATask) : 1),
        token_tiles(CeilDiv(seq, tokens)),
        head_tiles(CeilDiv(n_heads, heads)) {}
};

}  // namespace

void LatentAttention(const LatentAttentionArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t width = a.rank + a.rope, head_dim = a.nope + a.rope, half = a.rope / 2;
  ForEach(parallel, CeilDiv(a.batch * a.seq, kTokenTile), [&](size_t tile) {
    for (size_t t = tile * kTokenTile; t < std::min((tile + 1) * kTokenTile, a.batch * a.seq); ++t) {
      const float* in = a.kv + t * width;
      float* out = a.new_kv + t * width;
      const float inverse = 1.0f / std::sqrt(k.sum_of_squares(in, a.rank) / static_cast<float>(a.rank) + a.epsilon);
      for (size_t i = 0; i < a.rank; ++i) out[i] = in[i] * inverse * a.kv_norm[i];
      Rotate(in + a.rank, a.cos + t * half, a.sin + t * half, half, out + a.rank);
    }
  });
  const Cut cut(a.seq, a.n_heads);
  ForEach(parallel, a.batch * cut.token_tiles * cut.head_tiles, [&](size_t task) {
    const size_t b = task / (cut.token_tiles * cut.head_tiles);
    const size_t s0 = task / cut.head_tiles % cut.token_tiles * cut.tokens, h0 = task % cut.head_tiles * cut.heads;
    const size_t tokens = std::min(cut.tokens, a.seq - s0), heads = std::min(cut.heads, a.n_heads - h0);
    const size_t m = tokens * heads;  // row i: token s0 + i / heads, head h0 + i % heads; one of the two is 1 wide
    Scratch scratch(m * (width + a.rank + kRowBlock + a.nope + a.v_head_dim));
    float* queries = scratch.get();
    float* acc = queries + m * width;
    float* scores = acc + m * a.rank;
    SoftmaxRow state[kTokenTile];
    size_t seen[kTokenTile];
    for (size_t h = 0; h < heads; ++h) {
      // w_uk absorbed: the queries of one head, rows `heads` apart.
      float* head_queries = queries + h * width;
      const float* q = a.q + ((b * a.seq + s0) * a.n_heads + h0 + h) * head_dim;
      for (size_t s = 0; s < tokens; ++s) std::fill_n(head_queries + s * heads * width, a.rank, 0.0f);
      k.matmul_nn(q, a.n_heads * head_dim, tokens, a.w_uk + (h0 + h) * a.nope * a.rank, a.rank, a.nope, a.rank,
                  head_queries, heads * width);
      for (size_t s = 0; s < tokens; ++s) {
        const size_t t = b * a.seq + s0 + s;
        float* row = head_queries + s * heads * width;
        Rotate(q + s * a.n_heads * head_dim + a.nope, a.cos + t * half, a.sin + t * half, half, row + a.rank);
      }
    }
    k.scale(queries, a.scale, m * width);
    Start(state, acc, m, a.rank);
    const Tile tile{queries, m, width, a.rank, seen, scores, acc, state};
    const float* past = a.past + b * a.capacity * width;
    const size_t past_len = static_cast<size_t>(a.past_len[b]);
    std::fill(seen, seen + m, past_len);
    Attend(tile, {past, past, width, past_len}, k);
    for (size_t i = 0; i < m; ++i) seen[i] = s0 + i / heads + 1;
    const float* fresh = a.new_kv + b * a.seq * width;
    Attend(tile, {fresh, fresh, width, a.seq}, k);
    for (size_t i = 0; i < m; ++i) k.scale(acc + i * a.rank, 1.0f / state[i].sum, a.rank);
    for (size_t h = 0; h < heads; ++h)
      k.matmul_nt(acc + h * a.rank, heads * a.rank, tokens, a.w_uv + (h0 + h) * a.v_head_dim * a.rank, a.rank, a.v_head_dim,
                  a.rank, a.y + ((b * a.seq + s0) * a.n_heads + h0 + h) * a.v_head_dim, a.n_heads * a.v_head_dim);
  });
}

void GroupedQueryAttention(const GroupedQueryAttentionArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t half = a.head_dim / 2, kv_dim = a.n_kv_heads * a.head_dim, width = 2 * kv_dim;
  const size_t row_in = (a.n_heads + 2 * a.n_kv_heads) * a.head_dim, group = a.n_heads / a.n_kv_heads;
  ForEach(parallel, CeilDiv(a.batch * a.seq, kTokenTile), [&](size_t tile) {
    for (size_t t = tile * kTokenTile; t < std::min((tile + 1) * kTokenTile, a.batch * a.seq); ++t) {
      const float* keys = a.qkv + t * row_in + a.n_heads * a.head_dim;
      float* out = a.new_kv + t * width;
      for (size_t h = 0; h < a.n_kv_heads; ++h)
        Rotate(keys + h * a.head_dim, a.cos + t * half, a.sin + t * half, half, out + h * a.head_dim);
      std::memcpy(out + kv_dim, keys + kv_dim, kv_dim * sizeof(float));
    }
  });
  // Decode: the heads of one group share their rows, so a task takes a group (or part of a large one).
  const Cut cut(a.seq, group);
  const size_t tiles = cut.token_tiles * cut.head_tiles;
  ForEach(parallel, a.batch * a.n_kv_heads * tiles, [&](size_t task) {
    const size_t b = task / (a.n_kv_heads * tiles), kv_head = task / tiles % a.n_kv_heads;
    const size_t s0 = task / cut.head_tiles % cut.token_tiles * cut.tokens, g0 = task % cut.head_tiles * cut.heads;
    const size_t tokens = std::min(cut.tokens, a.seq - s0), heads = std::min(cut.heads, group - g0), m = tokens * heads;
    Scratch scratch(m * (2 * a.head_dim + kRowBlock));
    float* queries = scratch.get();
    float* acc = queries + m * a.head_dim;
    float* scores = acc + m * a.head_dim;
    SoftmaxRow state[kTokenTile];
    size_t seen[kTokenTile];
    const size_t h0 = kv_head * group + g0;
    for (size_t i = 0; i < m; ++i) {
      const size_t t = b * a.seq + s0 + i / heads;
      const float* q = a.qkv + t * row_in + (h0 + i % heads) * a.head_dim;
      Rotate(q, a.cos + t * half, a.sin + t * half, half, queries + i * a.head_dim);
    }
    k.scale(queries, a.scale, m * a.head_dim);
    Start(state, acc, m, a.head_dim);
    const Tile tile{queries, m, a.head_dim, a.head_dim, seen, scores, acc, state};
    const float* past = a.past + b * a.capacity * width + kv_head * a.head_dim;
    const size_t past_len = static_cast<size_t>(a.past_len[b]);
    std::fill(seen, seen + m, past_len);
    Attend(tile, {past, past + kv_dim, width, past_len}, k);
    for (size_t i = 0; i < m; ++i) seen[i] = s0 + i / heads + 1;
    const float* fresh = a.new_kv + b * a.seq * width + kv_head * a.head_dim;
    Attend(tile, {fresh, fresh + kv_dim, width, a.seq}, k);
    for (size_t i = 0; i < m; ++i) {
      const size_t t = b * a.seq + s0 + i / heads;
      float* y = a.y + (t * a.n_heads + h0 + i % heads) * a.head_dim;
      std::memcpy(y, acc + i * a.head_dim, a.head_dim * sizeof(float));
      k.scale(y, 1.0f / state[i].sum, a.head_dim);
    }
  });
}

}  // namespace mythos
