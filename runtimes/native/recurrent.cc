// What stands around the looped layers, token by token: signal and norm before, LoRA, injection and halting after.
#include <cmath>

#include "operators.h"

namespace mythos {
namespace {

constexpr size_t kTokensATask = 16;

template <typename Body>
void ForTokens(size_t tokens, const Parallel& parallel, const Body& body) {
  ForEach(parallel, CeilDiv(tokens, kTokensATask), [&](size_t task) {
    for (size_t t = task * kTokensATask; t < std::min(tokens, (task + 1) * kTokensATask); ++t) body(t);
  });
}

}  // namespace

void RecurrentInput(const RecurrentInputArgs& a, const Kernels& k, const Parallel& parallel) {
  ForTokens(a.tokens, parallel, [&](size_t t) {
    const float *h = a.h + t * a.dim, *e = a.e + t * a.dim;
    float* y = a.y + t * a.dim;
    for (size_t i = 0; i < a.dim; ++i) y[i] = h[i] + a.loop_signal[i] + e[i];
    k.rms_norm(y, a.norm, a.dim, a.epsilon, y);
  });
}

void RecurrentUpdate(const RecurrentUpdateArgs& a, const Kernels& k, const Parallel& parallel) {
  ForTokens(a.batch * a.seq, parallel, [&](size_t t) {
    const size_t at = t * a.dim;
    const float *x = a.x + at, *h = a.h + at, *e = a.e + at, *result = a.result + at;
    float* next = a.next_h + at;
    Scratch scratch(a.lora_rank + a.dim);
    float* low = scratch.get();
    float* lora = low + a.lora_rank;
    k.matmul_nt(x, a.dim, 1, a.lora_down, a.dim, a.lora_rank, a.dim, low, a.lora_rank);
    for (size_t i = 0; i < a.lora_rank; ++i) low[i] *= a.lora_scale[i];
    std::fill_n(lora, a.dim, 0.0f);
    k.matmul_nn(low, a.lora_rank, 1, a.lora_up, a.dim, a.lora_rank, a.dim, lora, a.dim);
    for (size_t i = 0; i < a.dim; ++i) next[i] = a.decay[i] * h[i] + a.injection[i] * e[i] + (x[i] + lora[i]);
    float logit;
    k.matmul_nt(next, a.dim, 1, a.halt, a.dim, 1, a.dim, &logit, 1);
    const float probability = 1.0f / (1.0f + std::exp(-(logit + a.halt_bias)));
    const float halted = a.halted_mass[t], mass = halted + probability;
    const bool running = halted < a.act_threshold && a.loop < a.n_loops[a.n_loops_per_row ? t / a.seq : 0];
    const float weight = mass >= a.act_threshold ? std::max(1.0f - halted, 0.0f) : probability;
    float* sum = a.next_result + at;
    if (running) {
      for (size_t i = 0; i < a.dim; ++i) sum[i] = result[i] + weight * next[i];
    } else {
      std::memcpy(sum, result, a.dim * sizeof(float));
    }
    a.next_halted_mass[t] = running ? mass : halted;
    a.next_exit_loop[t] = a.exit_loop[t] + running;
  });
}

}  // namespace mythos
