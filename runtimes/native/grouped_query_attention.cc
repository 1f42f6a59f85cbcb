// Grouped-query attention (arXiv 2305.13245): the query heads of a group share the rows of one key/value head.
#include <algorithm>
#include <vector>

#include "attend.h"
#include "operators.h"

namespace mythos {
namespace {

class Grouped {
 public:
  Grouped(const GroupedQueryAttentionArgs& args, const Kernels& kernels)
      : a(args), k(kernels), half(args.head_dim / 2), kv_dim(args.n_kv_heads * args.head_dim), width(2 * kv_dim),
        row_in((args.n_heads + 2 * args.n_kv_heads) * args.head_dim), group(args.n_heads / args.n_kv_heads),
        fresh(args.batch * args.seq * width) {}

  // The new rows: rotated keys, then values, rounded as the cache holds them.
  void NewRow(size_t t) {
    const float* keys = a.qkv + t * row_in + a.n_heads * a.head_dim;
    float* out = fresh.get() + t * width;
    for (size_t h = 0; h < a.n_kv_heads; ++h)
      Rotate(keys + h * a.head_dim, a.cos + t * half, a.sin + t * half, half, out + h * a.head_dim);
    std::memcpy(out + kv_dim, keys + kv_dim, kv_dim * sizeof(float));
    a.new_kv.Store(t, out, width, k);
  }

  // Queries of `tokens` tokens from s0 and `heads` heads from h0: row i is token s0 + i / heads, head h0 + i % heads.
  void MakeQueries(size_t b, size_t s0, size_t tokens, size_t h0, size_t heads, float* queries) const {
    for (size_t i = 0; i < tokens * heads; ++i) {
      const size_t t = b * a.seq + s0 + i / heads;
      const float* q = a.qkv + t * row_in + (h0 + i % heads) * a.head_dim;
      Rotate(q, a.cos + t * half, a.sin + t * half, half, queries + i * a.head_dim);
    }
    k.scale(queries, a.scale, tokens * heads * a.head_dim);
  }

  // From one key/value head on.
  Past PastRows(size_t b, size_t kv_head) const {
    const size_t at = kv_head * a.head_dim;
    return a.past.Sequence(b, a.capacity, width, static_cast<size_t>(a.past_len[b]), at, kv_dim + at, a.head_dim);
  }

  // The first position that the token at `position` sees.
  size_t FirstSeen(size_t position) const { return a.window == 0 || position < a.window ? 0 : position + 1 - a.window; }

  // The same among the cached rows of sequence b, for its new token s.
  size_t FirstRow(size_t b, size_t s) const {
    const size_t past_len = static_cast<size_t>(a.past_len[b]), first = FirstSeen(past_len + s);
    return first - std::min(first, past_len - std::min(past_len, a.capacity));
  }

  // Lets the same queries see the new rows up to their own, and writes their results.
  void Finish(size_t b, size_t s0, size_t tokens, size_t h0, size_t heads, const float* queries, float* acc, SoftmaxRow* state) const {
    const size_t m = tokens * heads, at = h0 / group * a.head_dim, past_len = static_cast<size_t>(a.past_len[b]);
    std::vector<size_t> from(m), to(m);
    for (size_t i = 0; i < m; ++i) {
      const size_t s = s0 + i / heads, first = FirstSeen(past_len + s);
      from[i] = first <= past_len ? 0 : first - past_len;
      to[i] = s + 1;
    }
    const float* rows = fresh.get() + b * a.seq * width;
    Attend({queries, 1, m, a.head_dim, a.head_dim, from.data(), to.data(), acc, state},
           {CacheType::kFloat32, rows, nullptr, width, at, kv_dim + at, a.head_dim, a.seq}, k);
    for (size_t i = 0; i < m; ++i) {
      const size_t t = b * a.seq + s0 + i / heads;
      float* y = a.y + (t * a.n_heads + h0 + i % heads) * a.head_dim;
      std::memcpy(y, acc + i * a.head_dim, a.head_dim * sizeof(float));
      k.scale(y, 1.0f / state[i].sum, a.head_dim);
    }
  }

  const GroupedQueryAttentionArgs& a;
  const Kernels& k;
  size_t half, kv_dim, width, row_in, group;
  Scratch fresh;
};

void Decode(const Grouped& grouped, const Splits& splits, const Parallel& parallel) {
  const GroupedQueryAttentionArgs& a = grouped.a;
  const size_t n = a.batch * a.n_heads, units = a.batch * a.n_kv_heads;
  Scratch queries(n * a.head_dim), acc(n * a.head_dim);
  std::vector<SoftmaxRow> states(n);
  for (size_t b = 0; b < a.batch; ++b) grouped.MakeQueries(b, 0, 1, 0, a.n_heads, queries.get() + b * a.n_heads * a.head_dim);
  AttendSplits(
      splits, {a.batch, a.n_kv_heads, grouped.group, a.head_dim, a.head_dim}, queries.get(),
      [&](size_t b) { return grouped.PastRows(b, 0); },
      [&](size_t b) { return grouped.FirstRow(b, 0); }, states.data(), acc.get(), grouped.k,
      parallel);
  ForEach(parallel, units, [&](size_t unit) {
    const size_t first = unit * grouped.group;
    grouped.Finish(unit / a.n_kv_heads, 0, 1, first % a.n_heads, grouped.group, queries.get() + first * a.head_dim,
                   acc.get() + first * a.head_dim, states.data() + first);
  });
}

}  // namespace

void GroupedQueryAttention(const GroupedQueryAttentionArgs& a, const Kernels& k, const Parallel& parallel) {
  Grouped grouped(a, k);
  const size_t total = a.batch * a.seq;
  ForEach(parallel, CeilDiv(total, kTokenTile), [&](size_t tile) {
    for (size_t t = tile * kTokenTile; t < std::min((tile + 1) * kTokenTile, total); ++t) grouped.NewRow(t);
  });
  const Splits splits(a.seq, a.batch, a.capacity, a.past_len);
  if (splits.any()) return Decode(grouped, splits, parallel);
  // Decode: the heads of one group share their rows, so a task takes a group (or part of a large one).
  const Cut cut(a.seq, grouped.group);
  const size_t tiles = cut.token_tiles * cut.head_tiles;
  ForEach(parallel, a.batch * a.n_kv_heads * tiles, [&](size_t task) {
    const size_t b = task / (a.n_kv_heads * tiles), kv_head = task / tiles % a.n_kv_heads;
    const size_t s0 = task / cut.head_tiles % cut.token_tiles * cut.tokens, g0 = task % cut.head_tiles * cut.heads;
    const size_t tokens = std::min(cut.tokens, a.seq - s0), heads = std::min(cut.heads, grouped.group - g0), m = tokens * heads;
    const size_t h0 = kv_head * grouped.group + g0;
    Scratch scratch(2 * m * a.head_dim);
    float* queries = scratch.get();
    float* acc = queries + m * a.head_dim;
    SoftmaxRow state[kTokenTile];
    grouped.MakeQueries(b, s0, tokens, h0, heads, queries);
    Start(state, acc, m, a.head_dim);
    const Past past = grouped.PastRows(b, kv_head);
    std::vector<size_t> from(m);
    const std::vector<size_t> to(m, past.count());
    for (size_t i = 0; i < m; ++i) from[i] = grouped.FirstRow(b, s0 + i / heads);
    Attend({queries, 1, m, a.head_dim, a.head_dim, from.data(), to.data(), acc, state}, past, k);
    grouped.Finish(b, s0, tokens, h0, heads, queries, acc, state);
  });
}

}  // namespace mythos
