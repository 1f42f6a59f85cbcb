// Linear layers with what stands around them: norm before, residual after; and the dense feed-forward made of two.
#include "operators.h"
#include "swiglu.h"

namespace mythos {

void NormalizedLinear(const NormalizedLinearArgs& a, const Kernels& k, const Parallel& parallel) {
  const size_t n_in = a.weight.k, n_out = a.weight.n;
  Activations x(a.tokens, a.weight, k);
  ForEach(parallel, x.groups(), [&](size_t group) {
    x.Fill(group, [&](size_t token, float* scratch) {
      k.rms_norm(a.x + token * n_in, a.norm, n_in, a.epsilon, scratch);
      return scratch;
    });
  });
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
  ForEach(parallel, x.groups(), [&](size_t group) {
    x.Fill(group, [&](size_t token, float* scratch) {
      k.rms_norm(a.x + token * dim, a.norm, dim, a.epsilon, scratch);
      return scratch;
    });
  });
  Scratch activated(a.tokens * hidden);
  const size_t rows = RowsATask(a.gate_up, a.tokens);
  ForEach(parallel, CeilDiv(hidden, rows), [&](size_t task) {
    Swiglu(x, a.gate_up, task * rows, std::min(rows, hidden - task * rows), k, activated.get());
  });
  Activations inner(a.tokens, a.down, k);
  ForEach(parallel, inner.groups(), [&](size_t group) {
    inner.Fill(group, [&](size_t token, float*) { return activated.get() + token * hidden; });
  });
  ForProducts(inner, a.down, parallel, [&](size_t token, size_t first, size_t n, const float* values, size_t stride) {
    const float* residual = a.x + token * dim + first;
    float* y = a.y + token * dim + first;
    for (size_t i = 0; i < n; ++i) y[i] = residual[i] + values[i * stride];
  });
}

}  // namespace mythos
