// Linear layers with what stands around them: norm before, residual after; and the dense feed-forward made of two.
#include "operators.h"
#include "swiglu.h"

namespace mythos {

namespace {

// x gets rms_norm of every row of `rows` [T, n].
void FillNormalized(Activations& x, const float* rows, const float* norm, size_t n, float epsilon, const Kernels& k,
                    const Parallel& parallel) {
  ForEach(parallel, x.groups(), [&](size_t group) {
    x.Fill(group, [&](size_t token, float* scratch) {
      k.rms_norm(rows + token * n, norm, n, epsilon, scratch);
      return scratch;
    });
  });
}

}  // namespace

void NormalizedLinear(const NormalizedLinearArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t n_out = a.weight.n;
  Activations x(a.tokens, a.weight, k);
  FillNormalized(x, a.x, a.norm, a.weight.k, a.epsilon, k, parallel);
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
  Activations x(a.tokens, a.gate_up, k);
  FillNormalized(x, a.x, a.norm, dim, a.epsilon, k, parallel);
  Scratch activated(a.tokens * hidden);
  const size_t rows = RowsATask(a.gate_up, a.tokens);
  ForEach(parallel, CeilDiv(hidden, rows), [&](size_t task) {
    Swiglu(x, a.gate_up, task * rows, std::min(rows, hidden - task * rows), k, activated.get());
  });
  ResidualLinear({a.tokens, a.x, activated.get(), a.down, a.y}, k, parallel);
}

}  // namespace mythos
