// The operators of ai.mythos as TensorRT plugins over the C interface of the CUDA kernels. Activations are float32 throughout, as the
// kernels take them; matrices and cache rows have their own dtypes. Where a plugin's inputs differ from the operator's
// (mythos_export/ops), so that nothing is needed on the host: a cache is the layer's own [B, C, W], a table over loops its row of this
// loop, n_loops what remains of it, halt_bias an attribute.
//
// Shape letters: B batch, S new tokens of a sequence, T = B S, D dim, I input and O output channels, E routed and s shared experts,
// F hidden channels, K top_k, H n_heads, N qk_nope_head_dim, Q qk_rope_head_dim, R kv_lora_rank, V v_head_dim, G n_kv_heads,
// C capacity, W width of the cache, r lora_rank.
#ifndef MYTHOS_NATIVE_TENSORRT_OPERATORS_H_
#define MYTHOS_NATIVE_TENSORRT_OPERATORS_H_

#include <algorithm>
#include <array>

#include "plugin.h"

namespace mythos::plugins {

inline int32_t extent(const Tensors& in, int tensor, int axis) { return int32_t(in[tensor].dims.d[axis]); }
inline int32_t tokens_of(const Tensors& in) { return extent(in, 0, 0) * extent(in, 0, 1); }

// [B, S, width] of the first input's B and S.
inline void rows(const DimsExprs* in, const IDimensionExpr* width, DimsExprs& out) {
  out.nbDims = 3;
  out.d[0] = in[0].d[0], out.d[1] = in[0].d[1], out.d[2] = width;
}

template <typename Struct>
Struct sized() {
  Struct call = {};
  call.size = sizeof(call);
  return call;
}

// Launches with a workspace of as much as it needs.
template <typename Struct>
int32_t launched(Struct& call, uint64_t (*needs)(const Struct*), int32_t (*launch)(const Struct*, void*), void* workspace, void* stream) {
  call.workspace = workspace;
  call.workspace_bytes = needs(&call);
  return launch(&call, stream);
}

// x [B, S, I], norm [I], weight [O, I] -> y [B, S, O]
struct NormalizedLinear {
  static constexpr char kName[] = "NormalizedLinear", kInputs[] = "ffw", kOutputs[] = "f";
  static constexpr std::array<int, 3> kRanks{3, 1, 2};
  static constexpr std::array<Field, 1> kFields{{{"epsilon", true}}};

  static bool shapes(const DimsExprs* in, const Values&, IExprBuilder&, DimsExprs* out) {
    rows(in, in[2].d[0], out[0]);
    return true;
  }
  static mythos_cuda_linear call(const Tensors& in, const Values& values) {
    auto call = sized<mythos_cuda_linear>();
    call.dtype = dtype_of(in[2].type), call.epsilon = values[0].number;
    call.tokens = tokens_of(in), call.outputs = extent(in, 2, 0), call.inputs = extent(in, 2, 1);
    return call;
  }
  static uint64_t workspace(const Tensors& in, const Values& values) {
    const auto largest = call(in, values);
    return mythos_cuda_linear_workspace(&largest);
  }
  static int32_t launch(const Tensors& in, const Values& values, const void* const* inputs, void* const* outputs, char* workspace,
                        void* stream) {
    auto linear = call(in, values);
    linear.x = static_cast<const float*>(inputs[0]), linear.norm = static_cast<const float*>(inputs[1]), linear.weight = inputs[2];
    linear.y = static_cast<float*>(outputs[0]);
    return launched(linear, mythos_cuda_linear_workspace, mythos_cuda_linear_launch, workspace, stream);
  }
};

// residual [B, S, O], x [B, S, I], weight [O, I] -> y [B, S, O]
struct ResidualLinear {
  static constexpr char kName[] = "ResidualLinear", kInputs[] = "ffw", kOutputs[] = "f";
  static constexpr std::array<int, 3> kRanks{3, 3, 2};
  static constexpr std::array<Field, 0> kFields{};

  static bool shapes(const DimsExprs* in, const Values&, IExprBuilder&, DimsExprs* out) {
    out[0] = in[0];
    return true;
  }
  static uint64_t workspace(const Tensors& in, const Values&) { return NormalizedLinear::workspace(in, {{}}); }
  static int32_t launch(const Tensors& in, const Values&, const void* const* inputs, void* const* outputs, char* workspace, void* stream) {
    auto linear = NormalizedLinear::call(in, {{}});
    linear.residual = static_cast<const float*>(inputs[0]), linear.x = static_cast<const float*>(inputs[1]), linear.weight = inputs[2];
    linear.y = static_cast<float*>(outputs[0]);
    return launched(linear, mythos_cuda_linear_workspace, mythos_cuda_linear_launch, workspace, stream);
  }
};

// x [B, S, D], norm [D], gate_up [2F, D], down [D, F] -> y [B, S, D]
struct FeedForward {
  static constexpr char kName[] = "FeedForward", kInputs[] = "ffww", kOutputs[] = "f";
  static constexpr std::array<int, 4> kRanks{3, 1, 2, 2};
  static constexpr std::array<Field, 1> kFields{{{"epsilon", true}}};

  static bool shapes(const DimsExprs* in, const Values&, IExprBuilder&, DimsExprs* out) {
    out[0] = in[0];
    return true;
  }
  static mythos_cuda_experts call(const Tensors& in, const Values& values) {
    auto call = sized<mythos_cuda_experts>();
    call.dtype = dtype_of(in[2].type), call.epsilon = values[0].number;
    call.tokens = tokens_of(in), call.dim = extent(in, 3, 0), call.expert_dim = extent(in, 3, 1), call.shared = 1;
    return call;
  }
  static uint64_t workspace(const Tensors& in, const Values& values) {
    const auto largest = call(in, values);
    return mythos_cuda_experts_workspace(&largest);
  }
  static int32_t launch(const Tensors& in, const Values& values, const void* const* inputs, void* const* outputs, char* workspace,
                        void* stream) {
    auto experts = call(in, values);
    experts.normed = experts.residual = static_cast<const float*>(inputs[0]), experts.norm = static_cast<const float*>(inputs[1]);
    experts.gate_up_shared = inputs[2], experts.down_shared = inputs[3], experts.mixed = static_cast<float*>(outputs[0]);
    return launched(experts, mythos_cuda_experts_workspace, mythos_cuda_experts_launch, workspace, stream);
  }
};

// x [B, S, D], norm [D], router [E, D], router_bias [E], gate_up [E + s, 2F, D], down [E + s, D, F] -> y [B, S, D]
struct MixtureOfExperts {
  static constexpr char kName[] = "MixtureOfExperts", kInputs[] = "ffffww", kOutputs[] = "f";
  static constexpr std::array<int, 6> kRanks{3, 1, 2, 1, 3, 3};
  static constexpr std::array<Field, 8> kFields{{{"top_k", false},
                                                 {"epsilon", true},
                                                 {"scoring", false},
                                                 {"normalized", false},
                                                 {"scale", true},
                                                 {"n_groups", false},
                                                 {"top_k_groups", false},
                                                 {"group_top_k", false}}};

  static bool shapes(const DimsExprs* in, const Values&, IExprBuilder&, DimsExprs* out) {
    out[0] = in[0];
    return true;
  }

  // Where a call's workspace has what: logits [T, E], chosen and weight [T, K], and what the router and the experts, one after the
  // other, work in.
  struct Layout {
    uint64_t chosen, weight, work, bytes;
  };
  static Layout layout(const mythos_cuda_linear& router, const mythos_cuda_experts& experts) {
    const uint64_t tokens = uint64_t(router.tokens), choices = aligned(tokens * experts.top_k * sizeof(float));
    Layout at;
    at.chosen = aligned(tokens * router.outputs * sizeof(float)), at.weight = at.chosen + choices, at.work = at.weight + choices;
    at.bytes = at.work + std::max(mythos_cuda_linear_workspace(&router), mythos_cuda_experts_workspace(&experts));
    return at;
  }
  static mythos_cuda_linear router_call(const Tensors& in, const Values& values) {
    auto call = sized<mythos_cuda_linear>();
    call.dtype = MYTHOS_CUDA_FLOAT32, call.epsilon = values[1].number;
    call.tokens = tokens_of(in), call.outputs = extent(in, 2, 0), call.inputs = extent(in, 2, 1);
    return call;
  }
  static mythos_cuda_experts experts_call(const Tensors& in, const Values& values) {
    auto call = sized<mythos_cuda_experts>();
    call.dtype = dtype_of(in[4].type), call.epsilon = values[1].number, call.top_k = values[0].integer;
    call.tokens = tokens_of(in), call.dim = extent(in, 5, 1), call.expert_dim = extent(in, 5, 2);
    call.routed = extent(in, 2, 0), call.shared = extent(in, 5, 0) - call.routed;
    return call;
  }
  static uint64_t workspace(const Tensors& in, const Values& values) {
    return layout(router_call(in, values), experts_call(in, values)).bytes;
  }
  static int32_t launch(const Tensors& in, const Values& values, const void* const* inputs, void* const* outputs, char* workspace,
                        void* stream) {
    auto router = router_call(in, values);
    auto experts = experts_call(in, values);
    const Layout at = layout(router, experts);
    const float *x = static_cast<const float*>(inputs[0]), *norm = static_cast<const float*>(inputs[1]);
    router.x = x, router.norm = norm, router.weight = inputs[2], router.y = reinterpret_cast<float*>(workspace);
    int32_t error = launched(router, mythos_cuda_linear_workspace, mythos_cuda_linear_launch, workspace + at.work, stream);
    if (error != 0) return error;

    auto routing = sized<mythos_cuda_routing>();
    routing.tokens = router.tokens, routing.experts = router.outputs, routing.top_k = experts.top_k;
    routing.sigmoid = values[2].integer, routing.normalized = values[3].integer, routing.scale = values[4].number;
    routing.groups = values[5].integer, routing.top_k_groups = values[6].integer, routing.group_top_k = values[7].integer;
    routing.logits = router.y, routing.bias = static_cast<const float*>(inputs[3]);
    routing.chosen = reinterpret_cast<int32_t*>(workspace + at.chosen), routing.weight = reinterpret_cast<float*>(workspace + at.weight);
    error = mythos_cuda_routing_launch(&routing, stream);
    if (error != 0) return error;

    experts.normed = experts.residual = x, experts.norm = norm, experts.chosen = routing.chosen, experts.weight = routing.weight;
    const int64_t number = bytes_of(in[4].type), inner = int64_t(experts.expert_dim) * experts.dim;
    experts.gate_up_routed = inputs[4], experts.down_routed = inputs[5];
    experts.gate_up_shared = static_cast<const char*>(inputs[4]) + number * 2 * inner * experts.routed;
    experts.down_shared = static_cast<const char*>(inputs[5]) + number * inner * experts.routed;
    experts.mixed = static_cast<float*>(outputs[0]);
    return launched(experts, mythos_cuda_experts_workspace, mythos_cuda_experts_launch, workspace + at.work, stream);
  }
};

// What attention works in at most: fewer tokens may need more of it, as their rows are split among more blocks. From so many sequences or
// new tokens on, the blocks keep any GPU busy without.
inline uint64_t attention_workspace(mythos_cuda_attention call) {
  constexpr int32_t kBusyBatch = 256, kBusySeq = 8448;
  const int32_t batch = call.batch, seq = call.seq;
  uint64_t bytes = mythos_cuda_attention_workspace(&call);
  for (call.batch = 1; call.batch <= std::min(batch, kBusyBatch); ++call.batch) {
    for (call.seq = 1; call.seq <= std::min(seq, kBusySeq / call.batch); ++call.seq) {
      bytes = std::max(bytes, mythos_cuda_attention_workspace(&call));
    }
  }
  return bytes;
}

// q [B, S, H (N + Q)], kv [B, S, R + Q], kv_norm [R], w_uk [H, R, N], w_uv [H, V, R], cos and sin [B, S, Q / 2], past_kv [B, C, W],
// past_len [B] -> y [B, S, H V], new_kv [B, S, W]
struct LatentAttention {
  static constexpr char kName[] = "LatentAttention", kInputs[] = "fffwwffcl", kOutputs[] = "fc";
  static constexpr std::array<int, 9> kRanks{3, 3, 1, 3, 3, 3, 3, 3, 1};
  static constexpr std::array<Field, 2> kFields{{{"scale", true}, {"epsilon", true}}};

  static bool shapes(const DimsExprs* in, const Values&, IExprBuilder& build, DimsExprs* out) {
    rows(in, build.operation(nvinfer1::DimensionOperation::kPROD, *in[4].d[0], *in[4].d[1]), out[0]);
    out[1] = in[1];
    return true;
  }
  static mythos_cuda_attention call(const Tensors& in, const Values& values) {
    auto call = sized<mythos_cuda_attention>();
    call.dtype = dtype_of(in[3].type), call.cache_dtype = dtype_of(in[7].type);
    call.batch = extent(in, 0, 0), call.seq = extent(in, 0, 1), call.capacity = extent(in, 7, 1);
    call.n_heads = extent(in, 3, 0), call.rank = extent(in, 3, 1), call.nope = extent(in, 3, 2), call.v_head_dim = extent(in, 4, 1);
    call.rope = extent(in, 1, 2) - call.rank, call.scale = values[0].number, call.epsilon = values[1].number;
    return call;
  }
  static uint64_t workspace(const Tensors& in, const Values& values) { return attention_workspace(call(in, values)); }
  static int32_t launch(const Tensors& in, const Values& values, const void* const* inputs, void* const* outputs, char* workspace,
                        void* stream) {
    auto attention = call(in, values);
    attention.q = static_cast<const float*>(inputs[0]), attention.kv = static_cast<const float*>(inputs[1]);
    attention.kv_norm = static_cast<const float*>(inputs[2]), attention.w_uk = inputs[3], attention.w_uv = inputs[4];
    attention.cos = static_cast<const float*>(inputs[5]), attention.sin = static_cast<const float*>(inputs[6]);
    attention.past = inputs[7], attention.past_len = static_cast<const int64_t*>(inputs[8]);
    attention.y = static_cast<float*>(outputs[0]), attention.new_kv = outputs[1];
    return launched(attention, mythos_cuda_attention_workspace, mythos_cuda_attention_launch, workspace, stream);
  }
};

// qkv [B, S, (H + 2G) V], cos and sin [B, S, V / 2], past_kv [B, C, 2 G V], past_len [B] -> y [B, S, H V], new_kv [B, S, 2 G V]
struct GroupedQueryAttention {
  static constexpr char kName[] = "GroupedQueryAttention", kInputs[] = "fffcl", kOutputs[] = "fc";
  static constexpr std::array<int, 5> kRanks{3, 3, 3, 3, 1};
  static constexpr std::array<Field, 4> kFields{{{"n_heads", false}, {"n_kv_heads", false}, {"window", false}, {"scale", true}}};

  static bool shapes(const DimsExprs* in, const Values& values, IExprBuilder& build, DimsExprs* out) {
    const int32_t heads = values[0].integer, groups = values[1].integer;
    if (heads <= 0 || groups <= 0) return false;
    using Operation = nvinfer1::DimensionOperation;
    const IDimensionExpr* head_dim = build.operation(Operation::kFLOOR_DIV, *in[0].d[2], *build.constant(heads + 2 * groups));
    rows(in, build.operation(Operation::kPROD, *head_dim, *build.constant(heads)), out[0]);
    rows(in, build.operation(Operation::kPROD, *head_dim, *build.constant(2 * groups)), out[1]);
    return true;
  }
  static mythos_cuda_attention call(const Tensors& in, const Values& values) {
    auto call = sized<mythos_cuda_attention>();
    call.dtype = MYTHOS_CUDA_FLOAT32, call.cache_dtype = dtype_of(in[3].type);
    call.batch = extent(in, 0, 0), call.seq = extent(in, 0, 1), call.capacity = extent(in, 3, 1);
    call.n_heads = values[0].integer, call.n_kv_heads = values[1].integer, call.window = values[2].integer;
    call.v_head_dim = extent(in, 0, 2) / std::max(1, call.n_heads + 2 * call.n_kv_heads), call.scale = values[3].number;
    return call;
  }
  static uint64_t workspace(const Tensors& in, const Values& values) { return attention_workspace(call(in, values)); }
  static int32_t launch(const Tensors& in, const Values& values, const void* const* inputs, void* const* outputs, char* workspace,
                        void* stream) {
    auto attention = call(in, values);
    attention.q = static_cast<const float*>(inputs[0]);
    attention.cos = static_cast<const float*>(inputs[1]), attention.sin = static_cast<const float*>(inputs[2]);
    attention.past = inputs[3], attention.past_len = static_cast<const int64_t*>(inputs[4]);
    attention.y = static_cast<float*>(outputs[0]), attention.new_kv = outputs[1];
    return launched(attention, mythos_cuda_attention_workspace, mythos_cuda_attention_launch, workspace, stream);
  }
};

// h and e [B, S, D], loop_signal [D], norm [D] -> y [B, S, D]
struct RecurrentInput {
  static constexpr char kName[] = "RecurrentInput", kInputs[] = "ffff", kOutputs[] = "f";
  static constexpr std::array<int, 4> kRanks{3, 3, 1, 1};
  static constexpr std::array<Field, 1> kFields{{{"epsilon", true}}};

  static bool shapes(const DimsExprs* in, const Values&, IExprBuilder&, DimsExprs* out) {
    out[0] = in[0];
    return true;
  }
  static uint64_t workspace(const Tensors&, const Values&) { return 0; }
  static int32_t launch(const Tensors& in, const Values& values, const void* const* inputs, void* const* outputs, char*, void* stream) {
    auto call = sized<mythos_cuda_recurrent_input>();
    call.tokens = tokens_of(in), call.dim = extent(in, 0, 2), call.epsilon = values[0].number;
    call.h = static_cast<const float*>(inputs[0]), call.e = static_cast<const float*>(inputs[1]);
    call.loop_signal = static_cast<const float*>(inputs[2]), call.norm = static_cast<const float*>(inputs[3]);
    call.y = static_cast<float*>(outputs[0]);
    return mythos_cuda_recurrent_input_launch(&call, stream);
  }
};

// x, h, e and result [B, S, D], halted_mass and exit_loop [B, S, 1], loops_left [B] or [1], lora_down [r, D], lora_scale [r], lora_up
// [r, D], decay, injection and halt [D] -> next_h and next_result [B, S, D], next_halted_mass and next_exit_loop [B, S, 1]
struct RecurrentUpdate {
  static constexpr char kName[] = "RecurrentUpdate", kInputs[] = "fffffllffffff", kOutputs[] = "fffl";
  static constexpr std::array<int, 13> kRanks{3, 3, 3, 3, 3, 3, 1, 2, 1, 2, 1, 1, 1};
  static constexpr std::array<Field, 2> kFields{{{"act_threshold", true}, {"halt_bias", true}}};

  static bool shapes(const DimsExprs* in, const Values&, IExprBuilder&, DimsExprs* out) {
    out[0] = in[1], out[1] = in[3], out[2] = in[4], out[3] = in[5];
    return true;
  }
  static uint64_t workspace(const Tensors&, const Values&) { return 0; }
  static int32_t launch(const Tensors& in, const Values& values, const void* const* inputs, void* const* outputs, char*, void* stream) {
    auto call = sized<mythos_cuda_recurrent_update>();
    call.batch = extent(in, 0, 0), call.seq = extent(in, 0, 1), call.dim = extent(in, 0, 2), call.lora_rank = extent(in, 7, 0);
    call.act_threshold = values[0].number, call.halt_bias = values[1].number;
    call.loop = 0;  // n_loops is what remains
    call.n_loops_per_row = extent(in, 6, 0) > 1;
    const auto floats = [inputs](int i) { return static_cast<const float*>(inputs[i]); };
    call.x = floats(0), call.h = floats(1), call.e = floats(2), call.result = floats(3), call.halted_mass = floats(4);
    call.exit_loop = static_cast<const int64_t*>(inputs[5]), call.n_loops = static_cast<const int64_t*>(inputs[6]);
    call.lora_down = floats(7), call.lora_scale = floats(8), call.lora_up = floats(9);
    call.decay = floats(10), call.injection = floats(11), call.halt = floats(12);
    call.next_h = static_cast<float*>(outputs[0]), call.next_result = static_cast<float*>(outputs[1]);
    call.next_halted_mass = static_cast<float*>(outputs[2]), call.next_exit_loop = static_cast<int64_t*>(outputs[3]);
    return mythos_cuda_recurrent_update_launch(&call, stream);
  }
};

}  // namespace mythos::plugins
#endif  // MYTHOS_NATIVE_TENSORRT_OPERATORS_H_
