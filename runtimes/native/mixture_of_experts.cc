// Routed SwiGLU experts: tokens grouped by expert, only chosen experts read, work cut by rows of their matrices.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "operators.h"
#include "scratch.h"

namespace mythos {
namespace {

// One chosen expert: its tokens stand at pairs [first, first + count) of the routing.
struct Chosen {
  size_t expert, first, count;
};

struct Routing {
  std::vector<Chosen> experts;
  std::vector<size_t> token;   // of each pair, grouped by expert
  std::vector<float> weight;   // of each pair
};

// Biased choice, weights by the softmax of the unbiased logits of the chosen (arXiv 2401.06066, 2408.15664).
Routing Route(const MixtureOfExpertsArgs& a, const Kernels& k, const Parallel& parallel) {
  Scratch logits(a.tokens * a.n_experts);
  std::fill_n(logits.get(), a.tokens * a.n_experts, 0.0f);
  constexpr size_t kTile = 16;
  ForEach(parallel, CeilDiv(a.tokens, kTile), [&](size_t tile) {
    const size_t t0 = tile * kTile, m = std::min(kTile, a.tokens - t0);
    k.matmul_nn(a.x + t0 * a.dim, a.dim, m, a.router, a.n_experts, a.dim, a.n_experts, logits.get() + t0 * a.n_experts,
                a.n_experts);
  });
  std::vector<size_t> expert(a.tokens * a.top_k), order(a.n_experts), count(a.n_experts + 1, 0);
  std::vector<float> weight(a.tokens * a.top_k);
  for (size_t t = 0; t < a.tokens; ++t) {
    const float* row = logits.get() + t * a.n_experts;
    std::iota(order.begin(), order.end(), size_t{0});
    std::partial_sort(order.begin(), order.begin() + a.top_k, order.end(), [&](size_t i, size_t j) {
      const float left = row[i] + a.router_bias[i], right = row[j] + a.router_bias[j];
      return left > right || (left == right && i < j);
    });
    float top = row[order[0]], sum = 0.0f;
    for (size_t i = 1; i < a.top_k; ++i) top = std::max(top, row[order[i]]);
    for (size_t i = 0; i < a.top_k; ++i) {
      expert[t * a.top_k + i] = order[i];
      sum += weight[t * a.top_k + i] = std::exp(row[order[i]] - top);
      ++count[order[i] + 1];
    }
    for (size_t i = 0; i < a.top_k; ++i) weight[t * a.top_k + i] /= sum;
  }
  Routing routing;
  routing.token.resize(expert.size());
  routing.weight.resize(expert.size());
  std::partial_sum(count.begin(), count.end(), count.begin());
  for (size_t e = 0; e < a.n_experts; ++e)
    if (count[e + 1] > count[e]) routing.experts.push_back({e, count[e], count[e + 1] - count[e]});
  for (size_t pair = 0; pair < expert.size(); ++pair) {
    const size_t at = count[expert[pair]]++;
    routing.token[at] = pair / a.top_k;
    routing.weight[at] = weight[pair];
  }
  return routing;
}

constexpr size_t kRows = 48;       // rows of a matrix a task
constexpr size_t kFewTokens = 5;   // of an expert: below this, dot products beat panels that are mostly empty

void AddWeighted(const MixtureOfExpertsArgs& a, const Routing& routing, size_t pair, const float* out, size_t stride,
                 size_t d0, size_t n) {
  float* y = a.y + routing.token[pair] * a.dim + d0;
  for (size_t i = 0; i < n; ++i) y[i] += routing.weight[pair] * out[i * stride];
}

// One expert's tokens: in rows [count][n] where they are few, in panels [count / kPanel][n][kPanel] where they are many.
struct Layout {
  bool panels;
  size_t count, lanes;  // lanes: count, or what whole panels hold
  explicit Layout(size_t tokens)
      : panels(tokens >= kFewTokens), count(tokens), lanes(panels ? CeilDiv(tokens, kPanel) * kPanel : tokens) {}
};

// out = x · rows(w)^T for one expert, rows [n][k] of w; out laid out as x.
void Multiply(const Layout& layout, const float* x, const float* w, size_t n, size_t k, float* out, const Kernels& kernels) {
  if (!layout.panels) {
    kernels.matmul_nt(x, k, layout.count, w, k, n, k, out, n);
    return;
  }
  std::fill_n(out, layout.lanes * n, 0.0f);
  for (size_t panel = 0; panel < layout.lanes / kPanel; ++panel)
    kernels.matmul_panel(w, k, 1, n, k, x + panel * k * kPanel, out + panel * n * kPanel);
}

}  // namespace

void MixtureOfExperts(const MixtureOfExpertsArgs& a, const Kernels& k, const Parallel& parallel) {
  const Routing routing = Route(a, k, parallel);
  const size_t n_chosen = routing.experts.size();
  std::vector<size_t> start(n_chosen + 1, 0);  // lanes before each chosen expert
  for (size_t c = 0; c < n_chosen; ++c) start[c + 1] = start[c] + Layout(routing.experts[c].count).lanes;
  Scratch gathered(start[n_chosen] * a.dim), activated(start[n_chosen] * a.expert_dim);

  ForEach(parallel, n_chosen, [&](size_t c) {
    const Chosen& chosen = routing.experts[c];
    const Layout layout(chosen.count);
    float* x = gathered.get() + start[c] * a.dim;
    if (layout.panels) std::fill_n(x, layout.lanes * a.dim, 0.0f);
    for (size_t i = 0; i < chosen.count; ++i) {
      const float* token = a.x + routing.token[chosen.first + i] * a.dim;
      if (!layout.panels) {
        std::memcpy(x + i * a.dim, token, a.dim * sizeof(float));
        continue;
      }
      float* lane = x + i / kPanel * a.dim * kPanel + i % kPanel;
      for (size_t at = 0; at < a.dim; ++at) lane[at * kPanel] = token[at];
    }
  });

  const size_t blocks = CeilDiv(a.expert_dim, kRows);
  ForEach(parallel, n_chosen * blocks, [&](size_t task) {
    const size_t c = task / blocks, f0 = task % blocks * kRows, n = std::min(kRows, a.expert_dim - f0);
    const Layout layout(routing.experts[c].count);
    const float* gate = a.gate_up + (routing.experts[c].expert * 2 * a.expert_dim + f0) * a.dim;
    const float* x = gathered.get() + start[c] * a.dim;
    float* out = activated.get() + start[c] * a.expert_dim;
    Scratch scratch(2 * layout.lanes * n);
    float* gates = scratch.get();
    float* ups = gates + layout.lanes * n;
    Multiply(layout, x, gate, n, a.dim, gates, k);
    Multiply(layout, x, gate + a.expert_dim * a.dim, n, a.dim, ups, k);
    // The task's channels f0 … f0 + n of every token, or of every panel.
    const size_t pieces = layout.panels ? layout.lanes / kPanel : layout.count, lanes = layout.panels ? kPanel : 1;
    for (size_t piece = 0; piece < pieces; ++piece)
      k.swiglu(gates + piece * n * lanes, ups + piece * n * lanes, n * lanes, out + (piece * a.expert_dim + f0) * lanes);
  });

  ForEach(parallel, CeilDiv(a.dim, kRows), [&](size_t task) {
    const size_t d0 = task * kRows, n = std::min(kRows, a.dim - d0);  // output channels that this task owns for every token
    for (size_t t = 0; t < a.tokens; ++t) std::fill_n(a.y + t * a.dim + d0, n, 0.0f);
    for (size_t c = 0; c < n_chosen; ++c) {
      const Chosen& chosen = routing.experts[c];
      const Layout layout(chosen.count);
      Scratch out(layout.lanes * n);
      Multiply(layout, activated.get() + start[c] * a.expert_dim, a.down + (chosen.expert * a.dim + d0) * a.expert_dim, n,
               a.expert_dim, out.get(), k);
      for (size_t i = 0; i < chosen.count; ++i) {
        const float* lane = layout.panels ? out.get() + i / kPanel * n * kPanel + i % kPanel : out.get() + i * n;
        AddWeighted(a, routing, chosen.first + i, lane, layout.panels ? kPanel : 1, d0, n);
      }
    }
  });
}

}  // namespace mythos
