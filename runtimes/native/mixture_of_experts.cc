// Routed and shared SwiGLU experts: tokens grouped by expert, only chosen experts read, work cut by rows of their matrices. Few tokens
// at a time: what is computed for all of them would take several times the memory of x.
#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <utility>
#include <vector>

#include "operators.h"
#include "swiglu.h"

namespace mythos {
namespace {

// Tokens that go through one expert together: of pairs [first, first + count) of the routing, or, where all go there, of
// themselves.
struct Piece {
  size_t expert, first, count;
  bool shared;
};

struct Assignment {
  std::vector<Piece> pieces;
  std::vector<size_t> token;  // of each pair, grouped by expert
  std::vector<float> weight;  // of each pair

  size_t TokenOf(const Piece& piece, size_t i) const { return piece.shared ? piece.first + i : token[piece.first + i]; }
  float WeightOf(const Piece& piece, size_t i) const { return piece.shared ? 1.0f : weight[piece.first + i]; }
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
    ForPieces(count[e + 1] - count[e], [&](size_t first, size_t n) { assigned.pieces.push_back({e, count[e] + first, n, false}); });
  ForPieces(a.tokens, [&](size_t first, size_t n) {
    for (size_t e = 0; e < a.n_shared; ++e) assigned.pieces.push_back({a.n_routed + e, first, n, true});
  });
  for (size_t pair = 0; pair < expert.size(); ++pair) {
    const size_t at = count[expert[pair]]++;
    assigned.token[at] = pair / top_k;
    assigned.weight[at] = weight[pair];
  }
  return assigned;
}

// logits [T, E] gets the router's, of rms_norm of x.
void Score(const MixtureOfExpertsArgs& a, const Kernels& k, const Parallel& parallel, float* logits) {
  ForPieces(a.tokens, [&](size_t start, size_t count) {
    Activations x(count, a.router, k);
    FillNormalized(x, a.x + start * a.router.k, a.norm, a.epsilon, k, parallel);
    ForProducts(x, a.router, parallel, [&](size_t token, size_t first, size_t n, const float* values, size_t stride) {
      float* to = logits + (start + token) * a.n_routed + first;
      for (size_t i = 0; i < n; ++i) to[i] = values[i * stride];
    });
  });
}

// Pieces that are worked on together: few enough tokens to keep what is computed of them, enough to keep threads busy.
class Run {
 public:
  static constexpr size_t kMostRows = 2 * kMostTokens;

  Run(const MixtureOfExpertsArgs& args, const Assignment& assigned, size_t first, size_t end, const Kernels& kernels,
      const Parallel& threads)
      : a(args), assigned_(assigned), k(kernels), parallel(threads), pieces_(assigned.pieces.data() + first), n_(end - first),
        start_(n_ + 1, 0) {
    for (size_t i = 0; i < n_; ++i) start_[i + 1] = start_[i] + pieces_[i].count;
  }

  size_t rows() const { return start_[n_]; }

  // activated [rows, F]. Every expert's tokens are normalized again: that is little beside what it computes of them.
  void Activate(float* activated) const {
    const size_t hidden = a.down.k;
    std::deque<Activations> inputs;
    std::vector<size_t> piece_of, input_of(n_);  // an input's first piece, a piece's input
    for (size_t i = 0; i < n_; ++i) {
      if (i == 0 || !SameTokens(pieces_[i - 1], pieces_[i])) {
        inputs.emplace_back(pieces_[i].count, a.gate_up, k);
        piece_of.push_back(i);
      }
      input_of[i] = inputs.size() - 1;
    }
    ForGroups(inputs, [&](size_t input, size_t group) {
      const Piece& piece = pieces_[piece_of[input]];
      FillNormalized(inputs[input], group, a.norm, a.epsilon, k,
                     [&](size_t j) { return a.x + assigned_.TokenOf(piece, j) * a.gate_up.k; });
    });
    const size_t rows = RowsATask(a.gate_up, a.tokens), tasks = CeilDiv(hidden, rows);
    ForEach(parallel, n_ * tasks, [&](size_t task) {
      const size_t i = task / tasks, first = task % tasks * rows;
      Swiglu(inputs[input_of[i]], a.gate_up.At(pieces_[i].expert), first, std::min(rows, hidden - first), k,
             activated + start_[i] * hidden);
    });
  }

  // y += what the experts make of `activated`, in the order of the pieces.
  void Add(const float* activated) const {
    const size_t hidden = a.down.k, dim = a.down.n;
    std::deque<Activations> inner;
    for (size_t i = 0; i < n_; ++i) inner.emplace_back(pieces_[i].count, a.down, k);
    ForGroups(inner, [&](size_t i, size_t group) {
      inner[i].Fill(group, [&](size_t j, float*) { return activated + (start_[i] + j) * hidden; });
    });
    const size_t rows = RowsATask(a.down, a.tokens);
    ForEach(parallel, CeilDiv(dim, rows), [&](size_t task) {
      const size_t first = task * rows, n = std::min(rows, dim - first);  // output channels of this task alone
      for (size_t i = 0; i < n_; ++i) {
        Scratch out(inner[i].lanes() * n);
        inner[i].Multiply(a.down.At(pieces_[i].expert), first, n, out.get());
        for (size_t j = 0; j < pieces_[i].count; ++j) {
          const float* values = inner[i].Result(out.get(), n, j);
          const float weight = assigned_.WeightOf(pieces_[i], j);
          float* y = a.y + assigned_.TokenOf(pieces_[i], j) * dim + first;
          for (size_t c = 0; c < n; ++c) y[c] += weight * values[c * inner[i].stride()];
        }
      }
    });
  }

 private:
  // A single token is the same for all experts.
  bool SameTokens(const Piece& one, const Piece& other) const {
    return a.tokens == 1 || (one.shared && other.shared && one.first == other.first);
  }

  // Calls body(i, group) for every group of tokens of xs[i].
  template <typename Body>
  void ForGroups(const std::deque<Activations>& xs, const Body& body) const {
    std::vector<std::pair<size_t, size_t>> groups;
    for (size_t i = 0; i < xs.size(); ++i)
      for (size_t group = 0; group < xs[i].groups(); ++group) groups.emplace_back(i, group);
    if (a.tokens == 1) {  // not worth another round of the threads
      for (const auto& [i, group] : groups) body(i, group);
    } else {
      ForEach(parallel, groups.size(), [&](size_t task) { body(groups[task].first, groups[task].second); });
    }
  }

  const MixtureOfExpertsArgs& a;
  const Assignment& assigned_;
  const Kernels& k;
  const Parallel& parallel;
  const Piece* pieces_;
  size_t n_;
  std::vector<size_t> start_;  // rows of `activated` before each piece's
};

}  // namespace

void MixtureOfExperts(const MixtureOfExpertsArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t dim = a.down.n;
  Scratch logits(a.tokens * a.n_routed);
  Score(a, k, parallel, logits.get());
  const Assignment assigned = Assign(a, logits.get());
  std::memcpy(a.y, a.x, a.tokens * dim * sizeof(float));
  const std::vector<Piece>& pieces = assigned.pieces;
  for (size_t first = 0, end; first < pieces.size(); first = end) {
    size_t rows = 0;
    for (end = first; end < pieces.size() && (end == first || rows + pieces[end].count <= Run::kMostRows); ++end)
      rows += pieces[end].count;
    const Run run(a, assigned, first, end, k, parallel);
    Scratch activated(run.rows() * a.down.k);
    run.Activate(activated.get());
    run.Add(activated.get());
  }
}

}  // namespace mythos
