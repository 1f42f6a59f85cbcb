// What the operators ask of a GPU: the CUDA kernels on the provider's stream, with workspaces from the provider's arena.
#pragma once
#include <climits>

#include "../onnxruntime_registry.h"
#include "mythos_cuda.h"

namespace mythos::onnxruntime {

inline int32_t Int(size_t value) {
  Require(value <= INT_MAX, "a tensor is too large for the CUDA kernels");
  return static_cast<int32_t>(value);
}

inline int32_t DtypeOf(const Matrix& w) {
  switch (w.type) {
    case WeightType::kFloat32: return MYTHOS_CUDA_FLOAT32;
    case WeightType::kFloat16: return MYTHOS_CUDA_FLOAT16;
    case WeightType::kBFloat16: return MYTHOS_CUDA_BFLOAT16;
    case WeightType::kInt8: return MYTHOS_CUDA_INT8;
    case WeightType::kInt4: return MYTHOS_CUDA_INT4;
    default: return MYTHOS_CUDA_FLOAT8;
  }
}

inline int32_t ScaleDtypeOf(const Matrix& w) { return w.half_scales ? MYTHOS_CUDA_FLOAT16 : MYTHOS_CUDA_FLOAT32; }

inline int32_t DtypeOf(CacheType type) {
  switch (type) {
    case CacheType::kFloat32: return MYTHOS_CUDA_FLOAT32;
    case CacheType::kFloat16: return MYTHOS_CUDA_FLOAT16;
    case CacheType::kInt8: return MYTHOS_CUDA_INT8;
    default: return MYTHOS_CUDA_BFLOAT16;
  }
}

inline void Check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error("ai.mythos: CUDA could not run " + std::string(what) + ": " + mythos_cuda_error(error));
}

inline uint64_t Aligned(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

// Calls of the C interface, one after another on one stream; `what` names the operator in errors.
class Calls {
 public:
  Calls(OrtKernelContext* context, const char* what) : stream_(Ort::KernelContext(context).GetGPUComputeStream()), what_(what) {}

  template <typename Call>
  void Launch(int32_t (*launch)(const Call*, void*), Call& call) const {
    call.size = sizeof(Call);
    Check(launch(&call, stream_), what_);
  }

  // Bytes of workspace that a call needs, in whole pieces of its alignment.
  template <typename Call>
  uint64_t Bytes(uint64_t (*workspace)(const Call*), Call& call) const {
    call.size = sizeof(Call);
    const uint64_t bytes = workspace(&call);
    if (bytes == 0) throw std::invalid_argument("ai.mythos: the CUDA kernels take no " + std::string(what_) + " of these sizes");
    return Aligned(bytes);
  }

 private:
  void* stream_;
  const char* what_;
};

// A piece of the provider's arena, which counts it to the kernel's stream: once the arena has grown, no call to CUDA is made, and
// what is given back is used again by what follows on the stream.
class Workspace {
 public:
  Workspace(OrtKernelContext* context, OrtAllocator* allocator, uint64_t bytes) : allocator_(allocator) {
    const OrtMemoryInfo* info = nullptr;
    Ort::ThrowOnError(Ort::GetApi().AllocatorGetInfo(allocator, &info));
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetScratchBuffer(context, info, bytes, &start_));
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { allocator_->Free(allocator_, start_); }

  template <typename T>
  T* At(uint64_t bytes) const {
    return reinterpret_cast<T*>(static_cast<char*>(start_) + bytes);
  }

 private:
  OrtAllocator* allocator_;
  void* start_ = nullptr;
};

class Gpu {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";
  static constexpr bool kReadsLengths = false, kQuantizedAttention = false;
  static std::vector<Type> Floats() { return {kFloat, kHalf, kBFloat16}; }
  static std::vector<Type> Caches() { return {kFloat, kHalf, kBFloat16, kInt8}; }

  explicit Gpu(const OrtKernelInfo* info) { Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_)); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  ~Gpu() { Ort::GetApi().ReleaseAllocator(allocator_); }

  void Run(const NormalizedLinearArgs& a, OrtKernelContext* context) const {
    mythos_cuda_linear call = Linear(a.tokens, a.weight);
    call.epsilon = a.epsilon, call.x = a.x, call.norm = a.norm, call.y = a.y;
    Launch(call, context, "NormalizedLinear");
  }

  // Outputs from `split` on go to rest.
  void Run(const NormalizedLinearArgs& a, size_t split, float* rest, OrtKernelContext* context) const {
    mythos_cuda_linear call = Linear(a.tokens, a.weight);
    call.epsilon = a.epsilon, call.x = a.x, call.norm = a.norm, call.y = a.y, call.split = Int(split), call.rest = rest;
    Launch(call, context, "NormalizedLinearSplit");
  }

  void Run(const ResidualLinearArgs& a, OrtKernelContext* context) const {
    mythos_cuda_linear call = Linear(a.tokens, a.weight);
    call.x = a.x, call.residual = a.residual, call.y = a.y;
    Launch(call, context, "ResidualLinear");
  }

  // One shared expert.
  void Run(const FeedForwardArgs& a, OrtKernelContext* context) const {
    mythos_cuda_experts call = Experts(a, 0);
    call.shared = 1;
    Launch(call, context, "FeedForward", mythos_cuda_experts_workspace, mythos_cuda_experts_launch);
  }

  void Run(const MixtureOfExpertsArgs& a, OrtKernelContext* context) const {
    const Calls calls(context, "MixtureOfExperts");
    mythos_cuda_linear router = Linear(a.tokens, a.router);
    router.epsilon = a.epsilon, router.x = a.x, router.norm = a.norm;
    mythos_cuda_routing routing = Routes(a);
    mythos_cuda_experts call = Experts(a, a.n_routed);
    call.top_k = Int(a.routing.top_k), call.shared = Int(a.n_shared);
    router.workspace_bytes = calls.Bytes(mythos_cuda_linear_workspace, router);
    call.workspace_bytes = calls.Bytes(mythos_cuda_experts_workspace, call);
    const uint64_t of_products = std::max(router.workspace_bytes, call.workspace_bytes);
    const uint64_t pairs = Aligned(a.tokens * a.routing.top_k * sizeof(float)), logits = Aligned(a.tokens * a.n_routed * sizeof(float));
    const Workspace workspace(context, allocator_, of_products + 2 * pairs + logits);
    router.workspace = call.workspace = workspace.At<void>(0);
    routing.chosen = workspace.At<int32_t>(of_products), routing.weight = workspace.At<float>(of_products + pairs);
    call.chosen = routing.chosen, call.weight = routing.weight;
    router.y = workspace.At<float>(of_products + 2 * pairs), routing.logits = router.y;
    calls.Launch(mythos_cuda_linear_launch, router);
    calls.Launch(mythos_cuda_routing_launch, routing);
    calls.Launch(mythos_cuda_experts_launch, call);
  }

  void Run(const LatentAttentionArgs& a, OrtKernelContext* context) const {
    mythos_cuda_attention call = Attention(a);
    call.dtype = DtypeOf(a.w_uk), call.w_uk = a.w_uk.values, call.w_uv = a.w_uv.values;
    call.nope = Int(a.nope), call.rope = Int(a.rope), call.rank = Int(a.rank), call.v_head_dim = Int(a.v_head_dim);
    call.epsilon = a.epsilon, call.q = a.q, call.kv = a.kv, call.kv_norm = a.kv_norm;
    Launch(call, context, "LatentAttention");
  }

  void Run(const GroupedQueryAttentionArgs& a, OrtKernelContext* context) const {
    mythos_cuda_attention call = Attention(a);
    call.n_kv_heads = Int(a.n_kv_heads), call.v_head_dim = Int(a.head_dim), call.window = Int(a.window), call.q = a.qkv;
    Launch(call, context, "GroupedQueryAttention");
  }

  // The zeros in front of a first loop [T, D], [T], [T], or null.
  struct Zeros {
    float *result, *halted_mass;
    int64_t* exit_loop;
  };
  void Run(const RecurrentInputArgs& a, OrtKernelContext* context, const Zeros& zeros = {}) const {
    mythos_cuda_recurrent_input call{};
    call.tokens = Int(a.tokens), call.dim = Int(a.dim), call.epsilon = a.epsilon;
    call.h = a.h, call.e = a.e, call.loop_signal = a.loop_signal, call.norm = a.norm, call.y = a.y;
    call.result = zeros.result, call.halted_mass = zeros.halted_mass, call.exit_loop = zeros.exit_loop;
    Calls(context, zeros.result == nullptr ? "RecurrentInput" : "RecurrentStart").Launch(mythos_cuda_recurrent_input_launch, call);
  }

  void Run(const RecurrentUpdateArgs& a, OrtKernelContext* context) const {
    mythos_cuda_recurrent_update call = Update(a);
    Calls(context, "RecurrentUpdate").Launch(mythos_cuda_recurrent_update_launch, call);
  }

  // And what enters the next loop, whose state and e are the update's.
  void Run(const RecurrentUpdateArgs& a, const RecurrentInputArgs& next, OrtKernelContext* context) const {
    mythos_cuda_recurrent_update call = Update(a);
    call.loop_signal = next.loop_signal, call.norm = next.norm, call.epsilon = next.epsilon, call.y = next.y;
    Calls(context, "RecurrentUpdateInput").Launch(mythos_cuda_recurrent_update_launch, call);
  }

 private:
  static mythos_cuda_recurrent_update Update(const RecurrentUpdateArgs& a) {
    mythos_cuda_recurrent_update call{};
    call.batch = Int(a.batch), call.seq = Int(a.seq), call.dim = Int(a.dim), call.lora_rank = Int(a.lora_rank);
    call.act_threshold = a.act_threshold, call.halt_bias = a.halt_bias, call.loop = a.loop, call.n_loops_per_row = a.n_loops_per_row;
    call.x = a.x, call.h = a.h, call.e = a.e, call.result = a.result, call.halted_mass = a.halted_mass;
    call.exit_loop = a.exit_loop, call.n_loops = a.n_loops;
    call.lora_down = a.lora_down, call.lora_scale = a.lora_scale, call.lora_up = a.lora_up;
    call.decay = a.decay, call.injection = a.injection, call.halt = a.halt;
    call.next_h = a.next_h, call.next_result = a.next_result, call.next_halted_mass = a.next_halted_mass;
    call.next_exit_loop = a.next_exit_loop;
    return call;
  }

  static mythos_cuda_linear Linear(size_t tokens, const Matrix& weight) {
    mythos_cuda_linear call{};
    call.dtype = DtypeOf(weight), call.tokens = Int(tokens), call.inputs = Int(weight.k), call.outputs = Int(weight.n);
    call.weight = weight.values, call.scales = weight.scales, call.scale_dtype = ScaleDtypeOf(weight), call.block = Int(weight.block);
    return call;
  }

  static mythos_cuda_routing Routes(const MixtureOfExpertsArgs& a) {
    mythos_cuda_routing call{};
    call.tokens = Int(a.tokens), call.experts = Int(a.n_routed), call.top_k = Int(a.routing.top_k);
    call.sigmoid = a.routing.sigmoid, call.normalized = a.routing.normalized, call.scale = a.routing.scale;
    call.groups = Int(a.routing.n_groups), call.top_k_groups = Int(a.routing.top_k_groups);
    call.group_top_k = Int(a.routing.group_top_k), call.bias = a.router_bias;
    return call;
  }

  // The first `routed` experts of the stacks are routed ones, shared ones follow.
  template <typename Args>
  static mythos_cuda_experts Experts(const Args& a, size_t routed) {
    const Matrix &gate_up = a.gate_up, &down = a.down;
    Require(gate_up.type == down.type && gate_up.half_scales == down.half_scales, "the CUDA kernels want gate_up and down of one type");
    mythos_cuda_experts call{};
    call.dtype = DtypeOf(gate_up), call.scale_dtype = ScaleDtypeOf(gate_up), call.block = Int(gate_up.block);
    call.tokens = Int(a.tokens), call.dim = Int(gate_up.k), call.expert_dim = Int(down.k), call.routed = Int(routed);
    call.gate_up_routed = gate_up.values, call.gate_up_routed_scales = gate_up.scales;
    call.down_routed = down.values, call.down_routed_scales = down.scales;
    const Matrix gate_up_shared = gate_up.At(routed), down_shared = down.At(routed);
    call.gate_up_shared = gate_up_shared.values, call.gate_up_shared_scales = gate_up_shared.scales;
    call.down_shared = down_shared.values, call.down_shared_scales = down_shared.scales;
    call.normed = a.x, call.norm = a.norm, call.epsilon = a.epsilon, call.residual = a.x, call.mixed = a.y;
    return call;
  }

  template <typename Args>
  static mythos_cuda_attention Attention(const Args& a) {
    mythos_cuda_attention call{};
    call.cache_dtype = DtypeOf(a.past.type), call.batch = Int(a.batch), call.seq = Int(a.seq), call.n_heads = Int(a.n_heads);
    call.capacity = Int(a.capacity), call.scale = a.scale, call.cos = a.cos, call.sin = a.sin;
    call.past = a.past.data, call.past_len = a.past_len, call.y = a.y, call.new_kv = a.new_kv.data;
    call.past_scale = a.past.scales, call.new_scale = a.new_kv.scales, call.row_scale = a.new_kv.row_scale;
    return call;
  }

  void Launch(mythos_cuda_linear& call, OrtKernelContext* context, const char* what) const {
    Launch(call, context, what, mythos_cuda_linear_workspace, mythos_cuda_linear_launch);
  }
  void Launch(mythos_cuda_attention& call, OrtKernelContext* context, const char* what) const {
    Launch(call, context, what, mythos_cuda_attention_workspace, mythos_cuda_attention_launch);
  }

  template <typename Call>
  void Launch(Call& call, OrtKernelContext* context, const char* what, uint64_t (*bytes)(const Call*),
              int32_t (*launch)(const Call*, void*)) const {
    const Calls calls(context, what);
    call.workspace_bytes = calls.Bytes(bytes, call);
    const Workspace workspace(context, allocator_, call.workspace_bytes);
    call.workspace = workspace.At<void>(0);
    calls.Launch(launch, call);
  }

  OrtAllocator* allocator_ = nullptr;
};

}  // namespace mythos::onnxruntime
