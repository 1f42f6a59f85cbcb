// Linear layers with what stands around them: norm before, residual after; and the dense feed-forward made of two.
#include "operators.h"
#include "swiglu.h"

namespace mythos {

void NormalizedLinear(const NormalizedLinearArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t n_out = a.weight.n;
  Activations x(a.tokens, a.weight, k);
  FillNormalized(x, a.x, a.norm, a.epsilon, k, parallel);
  ForProducts(x, a.weight, parallel, [&](size_t token, size_t first, size_t n, const float* values, size_t stride) {
    float* y = a.y + token * n_out + first;
    for (size_t i = 0; i < n; ++i) y[i] = values[i * stride];
  });
}

void ResidualLinear(const ResidualLinearArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t n_in = a.weight.k, n_out = a.weight.n;
  Activations x(a.tokens, a.weight, k);
  ForEach(parallel, x.groups(),
          [&](size_t group) { x.Fill(group, [&](size_t token, float*) { return a.x + token * n_in; }); });
  ForProducts(x, a.weight, parallel, [&](size_t token, size_t first, size_t n, const float* values, size_t stride) {
    const float* residual = a.residual + token * n_out + first;
    float* y = a.y + token * n_out + first;
    for (size_t i = 0; i < n; ++i) y[i] = residual[i] + values[i * stride];
  });
}

void FeedForward(const FeedForwardArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t dim = a.down.n, hidden = a.down.k;
  ForPieces(a.tokens, [&](size_t start, size_t count) {
    const float* tokens = a.x + start * dim;
    Scratch activated(count * hidden);
    {
      Activations x(count, a.gate_up, k);
      FillNormalized(x, tokens, a.norm, a.epsilon, k, parallel);
      const size_t rows = RowsATask(a.gate_up, count);
      ForEach(parallel, CeilDiv(hidden, rows), [&](size_t task) {
        Swiglu(x, a.gate_up, task * rows, std::min(rows, hidden - task * rows), k, activated.get());
      });
    }
    ResidualLinear({count, tokens, activated.get(), a.down, a.y + start * dim}, k, parallel);
  });
}

}  // namespace mythos
