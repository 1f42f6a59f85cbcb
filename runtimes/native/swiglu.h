// The hidden channels of a SwiGLU block (arXiv 2002.05202).
#pragma once
#include "matmul.h"

namespace mythos {

// out [m][F] gets channels [first, first + n) of silu(gate) * up for every token of x; gate_up [2F, D]: gate, then up.
inline void Swiglu(const Activations& x, const Matrix& gate_up, size_t first, size_t n, const Kernels& k, float* out) {
  const size_t hidden = gate_up.n / 2, size = x.lanes() * n;
  Scratch scratch(2 * size);
  float* gate = scratch.get();
  float* up = gate + size;
  x.Multiply(gate_up, first, n, gate);
  x.Multiply(gate_up, hidden + first, n, up);
  k.swiglu(gate, up, size, gate);
  for (size_t i = 0; i < x.m(); ++i) {
    const float* values = x.Result(gate, n, i);
    float* to = out + i * hidden + first;
    for (size_t j = 0; j < n; ++j) to[j] = values[j * x.stride()];
  }
}

}  // namespace mythos
