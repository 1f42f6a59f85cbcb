// The operators' algorithms over plain memory: what the onnxruntime kernels call, and what other hosts may.
//
// Shape letters: B batch, S new tokens, H query heads, K key/value heads, D head or model dim, R kv_lora_rank,
// N qk_nope_head_dim, Q qk_rope_head_dim, V v_head_dim, C capacity and W width of the cache, E experts, F expert_dim.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace mythos {

// Runs task(0) … task(n - 1), in any order, on whatever threads the host has.
struct Parallel {
  void* host;
  void (*run)(void* host, void (*task)(void* data, size_t index), size_t n, void* data);
};

struct LatentAttentionArgs {
  size_t batch, seq, n_heads, nope, rope, v_head_dim, rank, capacity;
  float scale, epsilon;
  const float* q;            // [B, S, H * (N + Q)]
  const float* kv;           // [B, S, R + Q]
  const float* kv_norm;      // [R]
  const float* w_uk;         // [H, N, R]
  const float* w_uv;         // [H, V, R]
  const float* cos;          // [B, S, Q / 2]
  const float* sin;          // [B, S, Q / 2]
  const float* past;         // [B, C, W]: this layer's slot
  const int64_t* past_len;   // [B]
  float* y;                  // [B, S, H * V]
  float* new_kv;             // [B, S, W]
};
void LatentAttention(const LatentAttentionArgs& a, const Kernels& kernels, const Parallel& parallel);

struct GroupedQueryAttentionArgs {
  size_t batch, seq, n_heads, n_kv_heads, head_dim, capacity;
  float scale;
  const float* qkv;          // [B, S, (H + 2K) * D]
  const float* cos;          // [B, S, D / 2]
  const float* sin;          // [B, S, D / 2]
  const float* past;         // [B, C, 2 * K * D]: this layer's slot
  const int64_t* past_len;   // [B]
  float* y;                  // [B, S, H * D]
  float* new_kv;             // [B, S, 2 * K * D]
};
void GroupedQueryAttention(const GroupedQueryAttentionArgs& a, const Kernels& kernels, const Parallel& parallel);

struct MixtureOfExpertsArgs {
  size_t tokens, dim, n_experts, expert_dim, top_k;
  const float* x;            // [tokens, D]
  const float* router;       // [D, E]
  const float* router_bias;  // [E]
  const float* gate_up;      // [E, 2F, D]
  const float* down;         // [E, D, F]
  float* y;                  // [tokens, D]
};
void MixtureOfExperts(const MixtureOfExpertsArgs& a, const Kernels& kernels, const Parallel& parallel);

}  // namespace mythos
