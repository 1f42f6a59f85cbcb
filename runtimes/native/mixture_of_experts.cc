// Routed and shared SwiGLU experts: tokens grouped by expert, only chosen experts read, work cut by rows of their matrices.
#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <vector>

#include "operators.h"
#include "swiglu.h"

namespace mythos {
namespace {

// An expert with work to do: its tokens stand at pairs [first, first + count) of the routing, a shared expert's are all.
struct Busy {
  size_t expert, first, count;
  bool shared;
};

struct Assignment {
  std::vector<Busy> experts;
  std::vector<size_t> token;  // of each pair, grouped by expert
  std::vector<float> weight;  // of each pair

  size_t TokenOf(const Busy& busy, size_t i) const { return busy.shared ? i : token[busy.first + i]; }
  float WeightOf(const Busy& busy, size_t i) const { return busy.shared ? 1.0f : weight[busy.first + i]; }
};

// logits [T, E].
Assignment Assign(const MixtureOfExpertsArgs& a, const float* logits) {
  const size_t top_k = a.routing.top_k;
  std::vector<size_t> expert(a.tokens * top_k), count(a.n_routed + 1, 0);
  std::vector<float> weight(a.tokens * top_k);
  Router router(a.routing, a.n_routed);
  for (size_t t = 0; t < a.tokens; ++t) {
    router.Choose(logits + t * a.n_routed, a.router_bias, &expert[t * top_k], &weight[t * top_k]);
    for (size_t i = 0; i < top_k; ++i) ++count[expert[t * top_k + i] + 1];
  }
  Assignment assigned;
  assigned.token.resize(expert.size());
  assigned.weight.resize(expert.size());
  std::partial_sum(count.begin(), count.end(), count.begin());
  for (size_t e = 0; e < a.n_routed; ++e)
    if (count[e + 1] > count[e]) assigned.experts.push_back({e, count[e], count[e + 1] - count[e], false});
  for (size_t e = 0; e < a.n_shared; ++e) assigned.experts.push_back({a.n_routed + e, 0, a.tokens, true});
  for (size_t pair = 0; pair < expert.size(); ++pair) {
    const size_t at = count[expert[pair]]++;
    assigned.token[at] = pair / top_k;
    assigned.weight[at] = weight[pair];
  }
  return assigned;
}

}  // namespace

void MixtureOfExperts(const MixtureOfExpertsArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t dim = a.down.n, hidden = a.down.k;
  Scratch normed(a.tokens * dim), logits(a.tokens * a.n_routed);
  Activations for_router(a.tokens, a.router, k), all(a.tokens, a.gate_up, k);
  ForEach(parallel, all.groups(), [&](size_t group) {
    for (size_t t = group * kPanel; t < std::min(a.tokens, (group + 1) * kPanel); ++t)
      k.rms_norm(a.x + t * dim, a.norm, dim, a.epsilon, normed.get() + t * dim);
    const auto get = [&](size_t token, float*) { return normed.get() + token * dim; };
    for_router.Fill(group, get);
    all.Fill(group, get);
  });
  ForProducts(for_router, a.router, parallel, [&](size_t token, size_t first, size_t n, const float* values, size_t stride) {
    for (size_t i = 0; i < n; ++i) logits.get()[token * a.n_routed + first + i] = values[i * stride];
  });
  const Assignment assigned = Assign(a, logits.get());

  // Every busy expert's tokens; a single token is the same for all.
  const size_t n_busy = assigned.experts.size();
  std::deque<Activations> gathered;
  std::vector<Activations*> inputs(n_busy, &all);
  std::vector<size_t> start(n_busy + 1, 0);  // rows of `activated` before each expert's
  for (size_t i = 0; i < n_busy; ++i) {
    const Busy& busy = assigned.experts[i];
    start[i + 1] = start[i] + busy.count;
    if (!busy.shared && a.tokens > 1) inputs[i] = &gathered.emplace_back(busy.count, a.gate_up, k);
  }
  if (!gathered.empty())
    ForEach(parallel, n_busy, [&](size_t i) {
      const Busy& busy = assigned.experts[i];
      if (inputs[i] == &all) return;
      for (size_t group = 0; group < inputs[i]->groups(); ++group)
        inputs[i]->Fill(group, [&](size_t j, float*) { return normed.get() + assigned.TokenOf(busy, j) * dim; });
    });

  Scratch activated(start[n_busy] * hidden);
  const size_t rows = RowsATask(a.gate_up, a.tokens), pieces = CeilDiv(hidden, rows);
  ForEach(parallel, n_busy * pieces, [&](size_t task) {
    const size_t i = task / pieces, first = task % pieces * rows;
    Swiglu(*inputs[i], a.gate_up.At(assigned.experts[i].expert), first, std::min(rows, hidden - first), k,
           activated.get() + start[i] * hidden);
  });

  std::deque<Activations> inner;
  for (const Busy& busy : assigned.experts) inner.emplace_back(busy.count, a.down, k);
  const auto fill_inner = [&](size_t i) {
    for (size_t group = 0; group < inner[i].groups(); ++group)
      inner[i].Fill(group, [&](size_t j, float*) { return activated.get() + (start[i] + j) * hidden; });
  };
  if (a.tokens == 1) {  // not worth another round of the threads
    for (size_t i = 0; i < n_busy; ++i) fill_inner(i);
  } else {
    ForEach(parallel, n_busy, fill_inner);
  }
  const size_t down_rows = RowsATask(a.down, a.tokens);
  ForEach(parallel, CeilDiv(dim, down_rows), [&](size_t task) {
    const size_t first = task * down_rows, n = std::min(down_rows, dim - first);  // output channels of this task alone
    for (size_t t = 0; t < a.tokens; ++t) std::memcpy(a.y + t * dim + first, a.x + t * dim + first, n * sizeof(float));
    for (size_t i = 0; i < n_busy; ++i) {
      const Busy& busy = assigned.experts[i];
      Scratch out(inner[i].lanes() * n);
      inner[i].Multiply(a.down.At(busy.expert), first, n, out.get());
      for (size_t j = 0; j < busy.count; ++j) {
        const float* values = inner[i].Result(out.get(), n, j);
        const float weight = assigned.WeightOf(busy, j);
        float* y = a.y + assigned.TokenOf(busy, j) * dim + first;
        for (size_t c = 0; c < n; ++c) y[c] += weight * values[c * inner[i].stride()];
      }
    }
  });
}

}  // namespace mythos
