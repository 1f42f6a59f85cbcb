// Multi-head latent attention (arXiv 2405.04434) on the cached latents themselves: w_uk absorbed into the query, w_uv applied
// to the result.
#include <algorithm>
#include <vector>

#include "attend.h"
#include "operators.h"

namespace mythos {
namespace {

class Latent {
 public:
  Latent(const LatentAttentionArgs& args, const Kernels& kernels)
      : a(args), k(kernels), width(args.rank + args.rope), head_dim(args.nope + args.rope), half(args.rope / 2),
        fresh(args.batch * args.seq * width) {}

  // The new rows: normalized latent, rotated key, rounded as the cache holds them.
  void NewRow(size_t t) {
    const float* in = a.kv + t * width;
    float* out = fresh.get() + t * width;
    k.rms_norm(in, a.kv_norm, a.rank, a.epsilon, out);
    Rotate(in + a.rank, a.cos + t * half, a.sin + t * half, half, out + a.rank);
    a.new_kv.Store(t, out, width, k);
  }

  // Queries of `tokens` tokens from s0 and `heads` heads from h0: row i is token s0 + i / heads, head h0 + i % heads.
  void MakeQueries(size_t b, size_t s0, size_t tokens, size_t h0, size_t heads, float* queries) const {
    Scratch absorbed(CeilDiv(tokens, kPanel) * kPanel * a.rank);
    for (size_t h = 0; h < heads; ++h) {
      const float* q = a.q + ((b * a.seq + s0) * a.n_heads + h0 + h) * head_dim;
      const Matrix w_uk = a.w_uk.At(h0 + h);
      Activations x(tokens, w_uk, k);
      for (size_t group = 0; group < x.groups(); ++group)
        x.Fill(group, [&](size_t s, float*) { return q + s * a.n_heads * head_dim; });
      x.Multiply(w_uk, 0, a.rank, absorbed.get());
      for (size_t s = 0; s < tokens; ++s) {
        const size_t t = b * a.seq + s0 + s;
        const float* latent = x.Result(absorbed.get(), a.rank, s);
        float* row = queries + (s * heads + h) * width;
        for (size_t i = 0; i < a.rank; ++i) row[i] = latent[i * x.stride()];
        Rotate(q + s * a.n_heads * head_dim + a.nope, a.cos + t * half, a.sin + t * half, half, row + a.rank);
      }
    }
    k.scale(queries, a.scale, tokens * heads * width);
  }

  Past PastRows(size_t b) const { return a.past.Sequence(b, a.capacity, width, static_cast<size_t>(a.past_len[b]), 0, 0, 0); }

  // Lets the same queries see the new rows up to their own, and writes their results.
  void Finish(size_t b, size_t s0, size_t tokens, size_t h0, size_t heads, const float* queries, float* acc, SoftmaxRow* state) const {
    const size_t m = tokens * heads;
    const std::vector<size_t> from(m, 0);
    std::vector<size_t> to(m);
    for (size_t i = 0; i < m; ++i) to[i] = s0 + i / heads + 1;
    const float* rows = fresh.get() + b * a.seq * width;
    Attend({queries, 1, m, width, a.rank, from.data(), to.data(), acc, state},
           {CacheType::kFloat32, rows, nullptr, width, 0, 0, 0, a.seq}, k);
    for (size_t i = 0; i < m; ++i) k.scale(acc + i * a.rank, 1.0f / state[i].sum, a.rank);
    Scratch out(CeilDiv(tokens, kPanel) * kPanel * a.v_head_dim);
    for (size_t h = 0; h < heads; ++h) {
      const Matrix w_uv = a.w_uv.At(h0 + h);
      Activations x(tokens, w_uv, k);
      for (size_t group = 0; group < x.groups(); ++group)
        x.Fill(group, [&](size_t s, float*) { return acc + (s * heads + h) * a.rank; });
      x.Multiply(w_uv, 0, a.v_head_dim, out.get());
      for (size_t s = 0; s < tokens; ++s) {
        const float* values = x.Result(out.get(), a.v_head_dim, s);
        float* y = a.y + ((b * a.seq + s0 + s) * a.n_heads + h0 + h) * a.v_head_dim;
        for (size_t i = 0; i < a.v_head_dim; ++i) y[i] = values[i * x.stride()];
      }
    }
  }

  const LatentAttentionArgs& a;
  const Kernels& k;
  size_t width, head_dim, half;
  Scratch fresh;
};

void Decode(const Latent& latent, const Splits& splits, const Parallel& parallel) {
  const LatentAttentionArgs& a = latent.a;
  const size_t n = a.batch * a.n_heads, tiles = CeilDiv(a.n_heads, kHeadTile);
  Scratch queries(n * latent.width), acc(n * a.rank);
  std::vector<SoftmaxRow> states(n);
  const auto for_heads = [&](const auto& body) {
    ForEach(parallel, a.batch * tiles, [&](size_t task) {
      const size_t b = task / tiles, h0 = task % tiles * kHeadTile;
      body(b, h0, std::min(kHeadTile, a.n_heads - h0), b * a.n_heads + h0);
    });
  };
  for_heads([&](size_t b, size_t h0, size_t heads, size_t first) {
    latent.MakeQueries(b, 0, 1, h0, heads, queries.get() + first * latent.width);
  });
  AttendSplits(
      splits, {a.batch, 1, a.n_heads, latent.width, a.rank}, queries.get(), [&](size_t b) { return latent.PastRows(b); },
      [](size_t) { return size_t{0}; }, states.data(), acc.get(), latent.k, parallel);
  for_heads([&](size_t b, size_t h0, size_t heads, size_t first) {
    latent.Finish(b, 0, 1, h0, heads, queries.get() + first * latent.width, acc.get() + first * a.rank, states.data() + first);
  });
}

}  // namespace

void LatentAttention(const LatentAttentionArgs& a, const Kernels& k, const Parallel& parallel) {
  Latent latent(a, k);
  const size_t total = a.batch * a.seq;
  ForEach(parallel, CeilDiv(total, kTokenTile), [&](size_t tile) {
    for (size_t t = tile * kTokenTile; t < std::min((tile + 1) * kTokenTile, total); ++t) latent.NewRow(t);
  });
  const Splits splits(a.seq, a.batch, a.capacity, a.past_len);
  if (splits.any()) return Decode(latent, splits, parallel);
  const Cut cut(a.seq, a.n_heads);
  ForEach(parallel, a.batch * cut.token_tiles * cut.head_tiles, [&](size_t task) {
    const size_t b = task / (cut.token_tiles * cut.head_tiles);
    const size_t s0 = task / cut.head_tiles % cut.token_tiles * cut.tokens, h0 = task % cut.head_tiles * cut.heads;
    const size_t tokens = std::min(cut.tokens, a.seq - s0), heads = std::min(cut.heads, a.n_heads - h0), m = tokens * heads;
    Scratch scratch(m * (latent.width + a.rank));
    float* queries = scratch.get();
    float* acc = queries + m * latent.width;
    SoftmaxRow state[kTokenTile];
    latent.MakeQueries(b, s0, tokens, h0, heads, queries);
    Start(state, acc, m, a.rank);
    const Past past = latent.PastRows(b);
    const std::vector<size_t> from(m, 0), to(m, past.count());
    Attend({queries, 1, m, latent.width, a.rank, from.data(), to.data(), acc, state}, past, k);
    latent.Finish(b, s0, tokens, h0, heads, queries, acc, state);
  });
}

}  // namespace mythos
