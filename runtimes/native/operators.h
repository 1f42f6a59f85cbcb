// The operators' algorithms over plain memory: what the onnxruntime kernels call, and what other hosts may.
//
// Shape letters: B batch, S new tokens, T = B * S, H query heads, K key/value heads, D head or model dim, R kv_lora_rank,
// N qk_nope_head_dim, Q qk_rope_head_dim, V v_head_dim, C capacity and W width of the cache, E experts, F expert_dim,
// I and O input and output channels, L loops, r lora_rank.
#pragma once
#include <cstddef>
#include <cstdint>

#include "attend.h"
#include "kernels.h"
#include "matmul.h"
#include "routing.h"

namespace mythos {

// y = rms_norm(x) · weight^T.
struct NormalizedLinearArgs {
  size_t tokens;
  float epsilon;
  const float* x;     // [T, I]
  const float* norm;  // [I]
  Matrix weight;      // [O, I]
  float* y;           // [T, O]
};
void NormalizedLinear(const NormalizedLinearArgs& a, const Kernels& kernels, const Parallel& parallel);

// y = residual + x · weight^T.
struct ResidualLinearArgs {
  size_t tokens;
  const float* residual;  // [T, O]
  const float* x;         // [T, I]
  Matrix weight;          // [O, I]
  float* y;               // [T, O]
};
void ResidualLinear(const ResidualLinearArgs& a, const Kernels& kernels, const Parallel& parallel);

// y = x + SwiGLU(rms_norm(x)).
struct FeedForwardArgs {
  size_t tokens;
  float epsilon;
  const float* x;     // [T, D]
  const float* norm;  // [D]
  Matrix gate_up;     // [2F, D]: rows of gate, then of up
  Matrix down;        // [D, F]
  float* y;           // [T, D]
};
void FeedForward(const FeedForwardArgs& a, const Kernels& kernels, const Parallel& parallel);

// y = x + the weighted sum of top_k of E routed experts and of the shared ones that follow them, on rms_norm(x).
struct MixtureOfExpertsArgs {
  size_t tokens, n_routed, n_shared;
  Routing routing;
  float epsilon;
  const float* x;            // [T, D]
  const float* norm;         // [D]
  Matrix router;             // [E, D] float32
  const float* router_bias;  // [E]
  Matrix gate_up;            // [2F, D]: of the first expert; the others follow
  Matrix down;               // [D, F]: the same
  float* y;                  // [T, D]
};
void MixtureOfExperts(const MixtureOfExpertsArgs& a, const Kernels& kernels, const Parallel& parallel);

struct LatentAttentionArgs {
  size_t batch, seq, n_heads, nope, rope, v_head_dim, rank, capacity;
  float scale, epsilon;
  const float* q;            // [B, S, H * (N + Q)]
  const float* kv;           // [B, S, R + Q]
  const float* kv_norm;      // [R]
  Matrix w_uk;               // [R, N]: of the first head; the others follow
  Matrix w_uv;               // [V, R]: the same
  const float* cos;          // [B, S, Q / 2]
  const float* sin;          // [B, S, Q / 2]
  Cache past;                // [B, C, W]: this layer's slot
  const int64_t* past_len;   // [B]
  float* y;                  // [B, S, H * V]
  NewRows new_kv;            // [B, S, W]
};
void LatentAttention(const LatentAttentionArgs& a, const Kernels& kernels, const Parallel& parallel);

struct GroupedQueryAttentionArgs {
  size_t batch, seq, n_heads, n_kv_heads, head_dim, capacity;
  size_t window;             // positions a token sees, itself included; 0 for all
  float scale;
  const float* qkv;          // [B, S, (H + 2K) * D]
  const float* cos;          // [B, S, D / 2]
  const float* sin;          // [B, S, D / 2]
  Cache past;                // [B, C, 2 * K * D]: this layer's slot
  const int64_t* past_len;   // [B]
  float* y;                  // [B, S, H * D]
  NewRows new_kv;            // [B, S, 2 * K * D]
};
void GroupedQueryAttention(const GroupedQueryAttentionArgs& a, const Kernels& kernels, const Parallel& parallel);

// y = rms_norm(h + loop_signal[loop] + e): what enters the looped layers.
struct RecurrentInputArgs {
  size_t tokens, dim;
  float epsilon;
  const float* h;            // [T, D]
  const float* e;            // [T, D]
  const float* loop_signal;  // [D]: the loop's row
  const float* norm;         // [D]
  float* y;                  // [T, D]
};
void RecurrentInput(const RecurrentInputArgs& a, const Kernels& kernels, const Parallel& parallel);

// The end of a loop: depth-wise LoRA, injection, halting. See mythos_export/ops/recurrent_update.py for the formulas.
struct RecurrentUpdateArgs {
  size_t batch, seq, dim, lora_rank;
  float act_threshold;
  int64_t loop;
  const float* x;            // [B, S, D]: what the looped layers returned
  const float* h;            // [B, S, D]
  const float* e;            // [B, S, D]
  const float* result;       // [B, S, D]
  const float* halted_mass;  // [B, S, 1]
  const int64_t* exit_loop;  // [B, S, 1]
  const int64_t* n_loops;    // [B], or [1] for all
  bool n_loops_per_row;
  const float* lora_down;    // [r, D]
  const float* lora_scale;   // [r]: the loop's row
  const float* lora_up;      // [r, D]
  const float* decay;        // [D]
  const float* injection;    // [D]
  const float* halt;         // [D]
  float halt_bias;
  float* next_h;             // [B, S, D]
  float* next_result;        // [B, S, D]
  float* next_halted_mass;   // [B, S, 1]
  int64_t* next_exit_loop;   // [B, S, 1]
};
void RecurrentUpdate(const RecurrentUpdateArgs& a, const Kernels& kernels, const Parallel& parallel);

}  // namespace mythos
