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

#define MYTHOS_CUDA_VERSION 3
#define MYTHOS_CUDA_FLOAT32 0
#define MYTHOS_CUDA_FLOAT16 1
#define MYTHOS_CUDA_BFLOAT16 2
// Weights, as bundles store them (int8: caches too, see there): rows with a scale for every `block` of neighbours (32, 64 or 128; the last of a row may have
// fewer). Int4 weights lie two a byte, the first in the low half, in two's complement. Float8 is e4m3fn (arXiv 2209.05433).
#define MYTHOS_CUDA_INT8 3
#define MYTHOS_CUDA_INT4 4
#define MYTHOS_CUDA_FLOAT8 5

// mixed[t] = [residual[t] +] sum over k of weight[t, k] * expert(chosen[t, k], x[t]) + sum over shared experts of expert(x[t]), where x
// is normed, or rms_norm(normed) where there is a norm, and expert(x) = down . (silu(gate . x) * (up . x)). All sums are float32. Products
// with float16 and bfloat16 stacks round what they are multiplied with to the stacks' dtype, but for few tokens, where it stays float32.
// Quantized stacks' weights times their scales are rounded to float16, as is what they are multiplied with; for few tokens weights stay
// exact, and the other side is rounded to 16 bits of precision.
typedef struct mythos_cuda_experts {
  uint32_t size;               // of this struct in bytes, for versions to come
  int32_t dtype;               // of the four stacks
  int32_t tokens, dim, expert_dim, top_k, routed, shared;  // T, D, F, K, E, S; S may be 0, or K and E
  int32_t scale_dtype, block;  // of quantized stacks: MYTHOS_CUDA_FLOAT32 or MYTHOS_CUDA_FLOAT16, and how many numbers share a scale
  const float* normed;         // [T, D]
  const int32_t* chosen;       // [T, K], from 0 to E - 1
  const float* weight;         // [T, K]
  const void* gate_up_routed;  // [E, 2F, D]: rows of gate, then of up
  const void* down_routed;     // [E, D, F]
  const void* gate_up_shared;  // [S, 2F, D]
  const void* down_shared;     // [S, D, F]
  const void *gate_up_routed_scales, *down_routed_scales, *gate_up_shared_scales, *down_shared_scales;  // one a block, or null
  const float* norm;           // [D], or null
  float epsilon;               // of the norm
  const float* residual;       // [T, D], or null
  float* mixed;                // [T, D], out
  void* workspace;             // aligned to 256 bytes
  uint64_t workspace_bytes;    // at least mythos_cuda_experts_workspace of this struct
} mythos_cuda_experts;

// MYTHOS_CUDA_VERSION of the library.
uint32_t mythos_cuda_version(void);
// y = [residual +] weight . [rms_norm] x, the norm's weight and the residual where there are any; rounded as with experts. Letters:
// I inputs, O outputs.
typedef struct mythos_cuda_linear {
  uint32_t size;             // of this struct in bytes
  int32_t dtype;             // of weight
  int32_t tokens, inputs, outputs;  // T, I, O
  int32_t scale_dtype, block;  // as of experts
  float epsilon;             // of the norm
  const float* x;            // [T, I]
  const float* norm;         // [I], or null
  const void* weight;        // [O, I]
  const void* scales;        // [O, ceil(I / block)], or null
  const float* residual;     // [T, O], or null; y itself may be it
  float* y;                  // [T, O], out; [T, split] where there is a split
  void* workspace;           // aligned to 256 bytes
  uint64_t workspace_bytes;  // at least mythos_cuda_linear_workspace of this struct
  int32_t split;             // outputs from here on go to rest, and there is no residual; 0: none do
  float* rest;               // [T, O - split], out
} mythos_cuda_linear;

uint64_t mythos_cuda_linear_workspace(const mythos_cuda_linear* linear);
int32_t mythos_cuda_linear_launch(const mythos_cuda_linear* linear, void* stream);

// Which routed experts each token goes to; see RoutingConfig of mythos_export/config.py.
typedef struct mythos_cuda_routing {
  uint32_t size;             // of this struct in bytes
  int32_t tokens, experts, top_k;  // T, E, K
  int32_t sigmoid;           // weights are sigmoids of logits, else their softmax
  int32_t normalized;        // weights of the chosen are divided by their sum
  float scale;               // of the weights
  int32_t groups, top_k_groups, group_top_k;  // equal runs of experts; how many are chosen from; how many of its best rank one
  const float* logits;       // [T, E]
  const float* bias;         // [E]: added for the choice only
  int32_t* chosen;           // [T, K], out: best first
  float* weight;             // [T, K], out
} mythos_cuda_routing;

int32_t mythos_cuda_routing_launch(const mythos_cuda_routing* routing, void* stream);

// What enters the looped layers: y = rms_norm(h + loop_signal + e). In front of the first loop, the zeros that it updates too.
typedef struct mythos_cuda_recurrent_input {
  uint32_t size;             // of this struct in bytes
  int32_t tokens, dim;       // T, D
  float epsilon;
  const float *h, *e;        // [T, D]
  const float *loop_signal, *norm;  // [D]: the loop's row
  float* y;                  // [T, D], out
  float *result, *halted_mass;  // [T, D], [T], out: zeros; or null, as the next
  int64_t* exit_loop;        // [T], out: zeros
} mythos_cuda_recurrent_input;

int32_t mythos_cuda_recurrent_input_launch(const mythos_cuda_recurrent_input* input, void* stream);

// The end of a loop; see mythos_export/ops/recurrent.py for the formulas. More letters: r lora_rank.
typedef struct mythos_cuda_recurrent_update {
  uint32_t size;             // of this struct in bytes
  int32_t batch, seq, dim, lora_rank;
  float act_threshold, halt_bias;
  int64_t loop;
  int32_t n_loops_per_row;   // whether n_loops is [B], else [1]
  const float *x, *h, *e, *result;  // [T, D]; x: what the looped layers returned
  const float* halted_mass;  // [T]
  const int64_t *exit_loop, *n_loops;  // [T]; [B] or [1]
  const float *lora_down, *lora_scale, *lora_up;  // [r, D], [r], [r, D]
  const float *decay, *injection, *halt;          // [D]
  float *next_h, *next_result, *next_halted_mass; // [T, D], [T, D], [T], out
  int64_t* next_exit_loop;   // [T], out
  const float *loop_signal, *norm;  // [D]: of the next loop's mythos_cuda_recurrent_input, whose h is next_h
  float epsilon;             // of the norm
  float* y;                  // [T, D], out: what that input is; null: it is not computed, and the three above are not read
} mythos_cuda_recurrent_update;

int32_t mythos_cuda_recurrent_update_launch(const mythos_cuda_recurrent_update* update, void* stream);

// Attention over a cache and the new tokens, which it adds to it as rows of new_kv: latent (arXiv 2405.04434) where n_kv_heads is 0,
// else grouped-query (arXiv 2305.13245). More shape letters: B batch, S new tokens of a sequence (T = B S), H n_heads,
// N qk_nope_head_dim, Q qk_rope_head_dim, R kv_lora_rank, V v_head_dim, G n_kv_heads, C capacity, W width of the cache: R + Q, or
// 2 G V. The row of position p stands at p mod C. An int8 row has one scale: it stands for its numbers times that.
typedef struct mythos_cuda_attention {
  uint32_t size;             // of this struct in bytes
  int32_t dtype;             // of w_uk and w_uv
  int32_t cache_dtype;       // of past and new_kv: MYTHOS_CUDA_FLOAT32, MYTHOS_CUDA_FLOAT16, MYTHOS_CUDA_BFLOAT16 or MYTHOS_CUDA_INT8
  int32_t batch, seq, n_heads, n_kv_heads, nope, rope, rank, v_head_dim, capacity;  // B, S, H, G, N, Q, R, V, C
  int32_t window;            // positions a token sees, itself included; 0 for all
  float scale, epsilon;      // of the scores; of the latent's norm
  const float* q;            // [T, H (N + Q)]; grouped-query: [T, (H + 2G) V], keys and values behind the queries
  const float* kv;           // [T, R + Q]; latent only
  const float* kv_norm;      // [R]; latent only
  const void *w_uk, *w_uv;   // [H, R, N], [H, V, R]; latent only
  const float *cos, *sin;    // [T, Q / 2]; grouped-query: [T, V / 2]
  const void* past;          // [B, C, W]
  const int64_t* past_len;   // [B]; to be written behind the rows that it counts: they may be read once it is there
  float* y;                  // [T, H V], out
  void* new_kv;              // [T, W], out
  void* workspace;           // aligned to 256 bytes
  uint64_t workspace_bytes;  // at least mythos_cuda_attention_workspace of this struct
  const float* past_scale;   // [B, C]; int8 only, as what follows is
  float* new_scale;          // [T], out
  float row_scale;           // of every new row, larger numbers cut off at 127; 0: each its own, its largest magnitude / 127
} mythos_cuda_attention;

uint64_t mythos_cuda_attention_workspace(const mythos_cuda_attention* attention);
int32_t mythos_cuda_attention_launch(const mythos_cuda_attention* attention, void* stream);

// The first counts[b] of each sequence's new rows into the cache: that of position p stands at p mod C; of more than C, the last ones.
// More letters: N slots.
typedef struct mythos_cuda_append {
  uint32_t size;             // of this struct in bytes
  int32_t slots, batch, seq, capacity;  // N, B, S, C
  int64_t row_bytes;
  const void* new_rows;      // [N, B, S, row_bytes]
  void* rows;                // [N, B, C, row_bytes]
  const int64_t *past_len, *counts;  // [B]
} mythos_cuda_append;

int32_t mythos_cuda_append_launch(const mythos_cuda_append* append, void* stream);

// The largest of each row of logits, the lowest id among equals, and its natural log-probability.
typedef struct mythos_cuda_likeliest {
  uint32_t size;             // of this struct in bytes
  int32_t rows, vocab;       // K, V
  const float* logits;       // [K, V]
  int64_t* tokens;           // [K], out
  float* logprobs;           // [K], out
  void* workspace;           // aligned to 256 bytes
  uint64_t workspace_bytes;  // at least mythos_cuda_likeliest_workspace of this struct
} mythos_cuda_likeliest;

uint64_t mythos_cuda_likeliest_workspace(const mythos_cuda_likeliest* likeliest);
int32_t mythos_cuda_likeliest_launch(const mythos_cuda_likeliest* likeliest, void* stream);

// A token from each row of logits, in the order of runtimes/sampling.py: repetition penalty, temperature (0 takes the largest), top_k (0
// keeps all), top_p, min_p, one draw. -1 where one is to be drawn from what is no number. V at most 2^20.
typedef struct mythos_cuda_choose {
  uint32_t size;             // of this struct in bytes
  int32_t rows, vocab;       // K, V
  int32_t top_k;
  double temperature, top_p, min_p, repetition_penalty;
  const float* logits;       // [K, V]
  const uint32_t* seen;      // [K, ceil(V / 32)]: bit v % 32 of word v / 32 for tokens under the penalty; null: none is
  uint64_t* random;          // [K], in and out: the state of SplitMix64, which a draw takes one number of
  int64_t* tokens;           // [K], out
  float* logprobs;           // [K], out: natural log-probabilities, of the logits as they are
  void* workspace;           // aligned to 256 bytes
  uint64_t workspace_bytes;  // at least mythos_cuda_choose_workspace of this struct
} mythos_cuda_choose;

uint64_t mythos_cuda_choose_workspace(const mythos_cuda_choose* choose);
int32_t mythos_cuda_choose_launch(const mythos_cuda_choose* choose, void* stream);

// What the next step reads: past_len += counts, and input_ids = tokens where there are any.
typedef struct mythos_cuda_advance {
  uint32_t size;             // of this struct in bytes
  int32_t batch;             // B
  int64_t* past_len;         // [B], in and out
  const int64_t* counts;     // [B]
  const int64_t* tokens;     // [B], or null
  int64_t* input_ids;        // [B], out; null where tokens are
} mythos_cuda_advance;

int32_t mythos_cuda_advance_launch(const mythos_cuda_advance* advance, void* stream);

// y[t] = row ids[t] of a table as floats. Letters: N rows, D dim, b blocks of D. A row that there is not is the nearest one that there is.
typedef struct mythos_cuda_embedding {
  uint32_t size;             // of this struct in bytes
  int32_t dtype;             // of table
  int32_t tokens, rows, dim; // T, N, D
  int32_t scale_dtype, block;  // as of experts
  const int64_t* ids;        // [T]
  const void* table;         // [N, D]
  const void* scales;        // [N, b], or null
  float* y;                  // [T, D], out
} mythos_cuda_embedding;

int32_t mythos_cuda_embedding_launch(const mythos_cuda_embedding* embedding, void* stream);

// y[b, s] = row past_len[b] + s of a table. Letters: N rows, D dim. A row that there is not is the nearest one that there is.
typedef struct mythos_cuda_position_rows {
  uint32_t size;             // of this struct in bytes
  int32_t batch, seq, rows, dim;  // B, S, N, D
  const int64_t* past_len;   // [B]
  const float* table;        // [N, D]
  float* y;                  // [B, S, D], out
} mythos_cuda_position_rows;

int32_t mythos_cuda_position_rows_launch(const mythos_cuda_position_rows* rows, void* stream);

// y[b, k] = x[b, positions[b, k]]. More letters: K positions of a sequence. A row that there is not is the nearest one that there is.
typedef struct mythos_cuda_pick_rows {
  uint32_t size;             // of this struct in bytes
  int32_t batch, seq, count, dim;  // B, S, K, D
  const int64_t* positions;  // [B, K]
  const float* x;            // [B, S, D]
  float* y;                  // [B, K, D], out
} mythos_cuda_pick_rows;

int32_t mythos_cuda_pick_rows_launch(const mythos_cuda_pick_rows* rows, void* stream);

// y = parts of the same size one after another.
typedef struct mythos_cuda_stack {
  uint32_t size;             // of this struct in bytes
  int32_t count;             // of parts
  uint64_t bytes;            // of a part
  const void* const* parts;  // [count], in the processor's memory, not read after the call
  void* y;                   // [count * bytes], out
} mythos_cuda_stack;

int32_t mythos_cuda_stack_launch(const mythos_cuda_stack* stack, void* stream);

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
