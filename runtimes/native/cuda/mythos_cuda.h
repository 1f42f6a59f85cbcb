// C interface of the CUDA kernels: what the Runner calls between the plans of an engine.
//
// Pointers are to device memory unless said otherwise; nothing here allocates or waits, so that every launch can be captured in a
// CUDA graph. Shape letters: T tokens, D dim, E routed experts, S shared experts, K top_k, F expert_dim.
#ifndef MYTHOS_CUDA_H_
#define MYTHOS_CUDA_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MYTHOS_CUDA_VERSION 1
#define MYTHOS_CUDA_FLOAT32 0
#define MYTHOS_CUDA_FLOAT16 1
#define MYTHOS_CUDA_BFLOAT16 2

// mixed[t] = sum over k of weight[t, k] * expert(chosen[t, k], normed[t]) + sum over shared experts of expert(normed[t]), where
// expert(x) = down . (silu(gate . x) * (up . x)). All sums are float32. Products with float16 and bfloat16 stacks round what they
// are multiplied with to the stacks' dtype, but for few tokens, where it stays float32.
typedef struct mythos_cuda_experts {
  uint32_t size;               // of this struct in bytes, for versions to come
  int32_t dtype;               // of the four stacks: MYTHOS_CUDA_FLOAT32, MYTHOS_CUDA_FLOAT16 or MYTHOS_CUDA_BFLOAT16
  int32_t tokens, dim, expert_dim, top_k, routed, shared;  // T, D, F, K, E, S; S may be 0
  const float* normed;         // [T, D]
  const int32_t* chosen;       // [T, K], from 0 to E - 1
  const float* weight;         // [T, K]
  const void* gate_up_routed;  // [E, 2F, D]: rows of gate, then of up
  const void* down_routed;     // [E, D, F]
  const void* gate_up_shared;  // [S, 2F, D]
  const void* down_shared;     // [S, D, F]
  float* mixed;                // [T, D], out
  void* workspace;             // aligned to 256 bytes
  uint64_t workspace_bytes;    // at least mythos_cuda_experts_workspace of this struct
} mythos_cuda_experts;

// MYTHOS_CUDA_VERSION of the library.
uint32_t mythos_cuda_version(void);
// Bytes of workspace for these sizes; grows with tokens. Reads no pointer and needs no GPU. 0 for sizes that no launch takes.
uint64_t mythos_cuda_experts_workspace(const mythos_cuda_experts* experts);
// Puts the kernels on a stream (a cudaStream_t). Returns a cudaError_t: 0 when launched.
int32_t mythos_cuda_experts_launch(const mythos_cuda_experts* experts, void* stream);
// The text of an error, in memory that lives as long as the library.
const char* mythos_cuda_error(int32_t error);

#ifdef __cplusplus
}
#endif
#endif  // MYTHOS_CUDA_H_
