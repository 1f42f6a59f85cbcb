// The operators as onnxruntime custom operators of the domain ai.mythos: shapes in, plain memory to the algorithms.
#include <cmath>
#include <deque>
#include <memory>
#include <vector>

#include "onnxruntime_tensors.h"

namespace mythos::onnxruntime {
namespace {

using Type = ONNXTensorElementDataType;
constexpr Type kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
               kBFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, kInt = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
               kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, kInt4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4, kFloat8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN,
               kPackedInt4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

template <typename T>
T Attribute(const OrtKernelInfo* info, const char* name) {
  return Ort::ConstKernelInfo(info).GetAttribute<T>(name);
}

struct NormalizedLinearKernel {
  WeightForm form;
  float epsilon;
  NormalizedLinearKernel(const OrtKernelInfo* info, bool quantized)
      : form(info, quantized), epsilon(Attribute<float>(info, "epsilon")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), norm = in.Next();
    NormalizedLinearArgs a{x.rows(), epsilon, x.floats(), norm.floats(), form.Read(in), nullptr};
    form.ReadActivationScales(in, {&a.weight});
    Require(x.back(0) == a.weight.k && norm.size() == a.weight.k, "x and norm do not fit weight");
    a.y = OutputLike(context, 0, x, a.weight.n);
    if (a.tokens > 0) NormalizedLinear(a, CurrentKernels(), HostThreads(context));
  }
};

struct ResidualLinearKernel {
  WeightForm form;
  ResidualLinearKernel(const OrtKernelInfo* info, bool quantized) : form(info, quantized) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input residual = in.Next(), x = in.Next();
    ResidualLinearArgs a{x.rows(), residual.floats(), x.floats(), form.Read(in), nullptr};
    form.ReadActivationScales(in, {&a.weight});
    Require(x.back(0) == a.weight.k && residual.back(0) == a.weight.n && residual.rows() == a.tokens,
            "x and residual do not fit weight");
    a.y = OutputLike(context, 0, residual, a.weight.n);
    if (a.tokens > 0) ResidualLinear(a, CurrentKernels(), HostThreads(context));
  }
};

struct FeedForwardKernel {
  WeightForm form;
  float epsilon;
  FeedForwardKernel(const OrtKernelInfo* info, bool quantized)
      : form(info, quantized), epsilon(Attribute<float>(info, "epsilon")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), norm = in.Next();
    FeedForwardArgs a{x.rows(), epsilon, x.floats(), norm.floats(), form.Read(in), form.Read(in), nullptr};
    form.ReadActivationScales(in, {&a.gate_up, &a.down});
    Require(x.back(0) == a.gate_up.k && norm.size() == a.gate_up.k && a.down.n == a.gate_up.k && a.gate_up.n == 2 * a.down.k,
            "x, norm, gate_up and down do not fit each other");
    a.y = OutputLike(context, 0, x, a.down.n);
    if (a.tokens > 0) FeedForward(a, CurrentKernels(), HostThreads(context));
  }
};

struct MixtureOfExpertsKernel {
  WeightForm form;
  int64_t top_k;
  float epsilon;
  MixtureOfExpertsKernel(const OrtKernelInfo* info, bool quantized)
      : form(info, quantized), top_k(Attribute<int64_t>(info, "top_k")), epsilon(Attribute<float>(info, "epsilon")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), norm = in.Next(), router = in.Next(), router_bias = in.Next();
    size_t experts = 0, experts_down = 0;
    MixtureOfExpertsArgs a{};
    a.gate_up = form.Read(in, &experts);
    a.down = form.Read(in, &experts_down);
    form.ReadActivationScales(in, {&a.gate_up, &a.down});
    a.tokens = x.rows(), a.n_routed = router.dim(0), a.top_k = static_cast<size_t>(top_k), a.epsilon = epsilon;
    const size_t dim = a.gate_up.k;
    Require(x.back(0) == dim && norm.size() == dim && router.dim(1) == dim && router_bias.size() == a.n_routed,
            "x, norm and router do not fit gate_up");
    Require(a.down.n == dim && a.gate_up.n == 2 * a.down.k && experts == experts_down && a.n_routed <= experts,
            "router, gate_up and down do not fit each other");
    Require(top_k >= 1 && a.top_k <= a.n_routed, "top_k is not between 1 and the number of routed experts");
    a.n_shared = experts - a.n_routed;
    a.x = x.floats(), a.norm = norm.floats(), a.router_bias = router_bias.floats();
    a.router.values = router.data(), a.router.n = a.n_routed, a.router.k = dim;
    a.y = OutputLike(context, 0, x, dim);
    if (a.tokens > 0) MixtureOfExperts(a, CurrentKernels(), HostThreads(context));
  }
};

CacheType CacheTypeOf(const Input& past_kv) {
  switch (past_kv.type()) {
    case kHalf: return CacheType::kFloat16;
    case kBFloat16: return CacheType::kBFloat16;
    case kInt8: return CacheType::kInt8;
    default: return CacheType::kFloat32;
  }
}

// The attribute of the forms for int8 caches, which have a third output, new_scale; 0 for the others.
float RowScale(const OrtKernelInfo* info) {
  if (Ort::ConstKernelInfo(info).GetOutputCount() < 3) return 0.0f;
  const float row_scale = Attribute<float>(info, "row_scale");
  Require(row_scale >= 0.0f && std::isfinite(row_scale), "row_scale is negative or not finite");
  return row_scale;
}

// past_kv [slots, B, C, W], past_len [B] and slot [], with past_scale [slots, B, C] after past_kv where that is int8.
struct CacheInputs {
  Input past_kv;
  Cache slot_rows;
  const int64_t* past_len;
  size_t capacity, width;

  CacheInputs(Inputs& in, size_t batch) : past_kv(in.Next()) {
    const CacheType type = CacheTypeOf(past_kv);
    const float* scales = type == CacheType::kInt8 ? in.Next().floats() : nullptr;
    const Input lengths = in.Next(), slot = in.Next();
    capacity = past_kv.dim(2), width = past_kv.dim(3), past_len = lengths.ints();
    Require(past_kv.dim(1) == batch, "past_kv has another batch than the new tokens");
    Require(lengths.size() == batch, "past_len needs one length a sequence");
    for (size_t b = 0; b < batch; ++b)
      Require(past_len[b] >= 0 && static_cast<size_t>(past_len[b]) <= capacity,
              "past_len is negative or beyond the cache's capacity");
    const int64_t index = slot.ints()[0];
    Require(index >= 0 && index < past_kv.shape()[0], "slot is outside past_kv");
    const size_t rows = static_cast<size_t>(index) * batch * capacity;
    slot_rows = {type, static_cast<const char*>(past_kv.data()) + rows * width * SizeOf(type),
                 scales == nullptr ? nullptr : scales + rows};
  }

  // The outputs for the new rows, at `index` and, for int8, at the one after it.
  NewRows Rows(OrtKernelContext* context, size_t index, const Input& x, float row_scale) const {
    const int64_t shape[] = {x.shape()[0], x.shape()[1], static_cast<int64_t>(width)};
    float* scales = slot_rows.type == CacheType::kInt8 ? Output<float>(context, index + 1, shape, 2) : nullptr;
    return {slot_rows.type, Ort::KernelContext(context).GetOutput(index, shape, 3).GetTensorMutableRawData(), scales,
            row_scale};
  }
};

struct LatentAttentionKernel {
  WeightForm form;
  float scale, epsilon, row_scale;
  LatentAttentionKernel(const OrtKernelInfo* info, bool quantized)
      : form(info, quantized), scale(Attribute<float>(info, "scale")), epsilon(Attribute<float>(info, "epsilon")),
        row_scale(RowScale(info)) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input q = in.Next(), kv = in.Next(), kv_norm = in.Next();
    LatentAttentionArgs a{};
    size_t heads_uv = 0;
    a.w_uk = form.Read(in, &a.n_heads);
    a.w_uv = form.Read(in, &heads_uv);
    const Input cos = in.Next(), sin = in.Next();
    a.batch = q.dim(0), a.seq = q.dim(1), a.nope = a.w_uk.k, a.rank = a.w_uk.n, a.v_head_dim = a.w_uv.n;
    const CacheInputs cache(in, a.batch);
    form.ReadActivationScales(in, {&a.w_uk, &a.w_uv});
    Require(kv.dim(2) > a.rank && kv.dim(2) == cache.width && kv_norm.size() == a.rank, "kv does not fit w_uk and past_kv");
    a.rope = kv.dim(2) - a.rank, a.capacity = cache.capacity;
    Require(q.dim(2) == a.n_heads * (a.nope + a.rope) && heads_uv == a.n_heads && a.w_uv.k == a.rank, "q does not fit w_uk and w_uv");
    Require(cos.back(0) * 2 == a.rope && sin.back(0) * 2 == a.rope, "cos and sin do not fit kv");
    a.scale = scale, a.epsilon = epsilon;
    a.q = q.floats(), a.kv = kv.floats(), a.kv_norm = kv_norm.floats(), a.cos = cos.floats(), a.sin = sin.floats();
    a.past = cache.slot_rows, a.past_len = cache.past_len;
    a.y = OutputLike(context, 0, q, a.n_heads * a.v_head_dim);
    a.new_kv = cache.Rows(context, 1, q, row_scale);
    if (a.batch * a.seq > 0) LatentAttention(a, CurrentKernels(), HostThreads(context));
  }
};

struct GroupedQueryAttentionKernel {
  int64_t n_heads, n_kv_heads, window;
  float scale, row_scale;
  GroupedQueryAttentionKernel(const OrtKernelInfo* info, bool)
      : n_heads(Attribute<int64_t>(info, "n_heads")),
        n_kv_heads(Attribute<int64_t>(info, "n_kv_heads")),
        window(Attribute<int64_t>(info, "window")),
        scale(Attribute<float>(info, "scale")),
        row_scale(RowScale(info)) {
    Require(n_heads > 0 && n_kv_heads > 0 && n_heads % n_kv_heads == 0 && window >= 0,
            "n_heads is no multiple of n_kv_heads, or window is negative");
  }

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input qkv = in.Next(), cos = in.Next(), sin = in.Next();
    GroupedQueryAttentionArgs a{};
    a.batch = qkv.dim(0), a.seq = qkv.dim(1);
    a.n_heads = static_cast<size_t>(n_heads), a.n_kv_heads = static_cast<size_t>(n_kv_heads);
    a.window = static_cast<size_t>(window);
    a.head_dim = qkv.dim(2) / (a.n_heads + 2 * a.n_kv_heads);
    const CacheInputs cache(in, a.batch);
    Require(cache.width == 2 * a.n_kv_heads * a.head_dim, "past_kv does not fit qkv");
    Require(cos.back(0) * 2 == a.head_dim && sin.back(0) * 2 == a.head_dim, "cos and sin do not fit qkv");
    a.scale = scale, a.capacity = cache.capacity;
    a.qkv = qkv.floats(), a.cos = cos.floats(), a.sin = sin.floats();
    a.past = cache.slot_rows, a.past_len = cache.past_len;
    a.y = OutputLike(context, 0, qkv, a.n_heads * a.head_dim);
    a.new_kv = cache.Rows(context, 1, qkv, row_scale);
    if (a.batch * a.seq > 0) GroupedQueryAttention(a, CurrentKernels(), HostThreads(context));
  }
};

// Row `loop` of a table [L, n].
const float* TableRow(const Input& table, int64_t loop, size_t n) {
  Require(loop >= 0 && loop < table.shape()[0] && table.back(0) == n, "loop is outside a table over loops");
  return table.floats() + static_cast<size_t>(loop) * n;
}

struct RecurrentInputKernel {
  float epsilon;
  RecurrentInputKernel(const OrtKernelInfo* info, bool) : epsilon(Attribute<float>(info, "epsilon")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input h = in.Next(), e = in.Next(), loop_signal = in.Next(), norm = in.Next(), loop = in.Next();
    const size_t dim = h.back(0);
    Require(e.size() == h.size() && norm.size() == dim, "h, e and norm do not fit each other");
    RecurrentInputArgs a{h.rows(), dim, epsilon, h.floats(), e.floats(), TableRow(loop_signal, loop.ints()[0], dim),
                         norm.floats(), OutputLike(context, 0, h, dim)};
    if (a.tokens > 0) RecurrentInput(a, CurrentKernels(), HostThreads(context));
  }
};

struct RecurrentUpdateKernel {
  float act_threshold;
  RecurrentUpdateKernel(const OrtKernelInfo* info, bool) : act_threshold(Attribute<float>(info, "act_threshold")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), h = in.Next(), e = in.Next(), result = in.Next(), halted_mass = in.Next(), exit_loop = in.Next();
    const Input loop = in.Next(), n_loops = in.Next(), lora_down = in.Next(), lora_scale = in.Next(), lora_up = in.Next();
    const Input decay = in.Next(), injection = in.Next(), halt = in.Next(), halt_bias = in.Next();
    RecurrentUpdateArgs a{};
    a.batch = x.dim(0), a.seq = x.dim(1), a.dim = x.dim(2), a.lora_rank = lora_down.dim(0), a.loop = loop.ints()[0];
    const size_t tokens = a.batch * a.seq;
    Require(h.size() == x.size() && e.size() == x.size() && result.size() == x.size(), "x, h, e and result differ in size");
    Require(halted_mass.size() == tokens && exit_loop.size() == tokens, "halted_mass and exit_loop need one number a token");
    Require(n_loops.size() == a.batch || n_loops.size() == 1, "n_loops needs one number a sequence, or one for all");
    Require(lora_down.dim(1) == a.dim && lora_up.dim(0) == a.lora_rank && lora_up.dim(1) == a.dim, "the LoRA does not fit x");
    Require(decay.size() == a.dim && injection.size() == a.dim && halt.size() == a.dim && halt_bias.size() == 1,
            "decay, injection and halt do not fit x");
    a.act_threshold = act_threshold, a.n_loops_per_row = n_loops.size() == a.batch && a.batch > 1;
    a.x = x.floats(), a.h = h.floats(), a.e = e.floats(), a.result = result.floats(), a.halted_mass = halted_mass.floats();
    a.exit_loop = exit_loop.ints(), a.n_loops = n_loops.ints(), a.lora_down = lora_down.floats();
    a.lora_scale = TableRow(lora_scale, a.loop, a.lora_rank), a.lora_up = lora_up.floats();
    a.decay = decay.floats(), a.injection = injection.floats(), a.halt = halt.floats(), a.halt_bias = halt_bias.floats()[0];
    a.next_h = OutputLike(context, 0, x, a.dim), a.next_result = OutputLike(context, 1, x, a.dim);
    a.next_halted_mass = OutputLike(context, 2, x, 1);
    const int64_t shape[] = {x.shape()[0], x.shape()[1], 1};
    a.next_exit_loop = Output<int64_t>(context, 3, shape, 3);
    if (tokens > 0) RecurrentUpdate(a, CurrentKernels(), HostThreads(context));
  }
};

// Nothing is thrown into onnxruntime: it may be built with another C++ runtime.
template <typename Body>
OrtStatusPtr Guarded(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  }
}

template <typename Kernel>
struct Status : Kernel {
  using Kernel::Kernel;
  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    return Guarded([&] { this->Compute(context); });
  }
};

// One operator for one choice of types; onnxruntime asks for them one by one.
template <typename Kernel>
struct Operator : Ort::CustomOpBase<Operator<Kernel>, Status<Kernel>, true> {
  const char* name;
  bool quantized;
  std::vector<Type> inputs, outputs;

  Operator(const char* op_name, bool is_quantized, std::vector<Type> input_types, std::vector<Type> output_types)
      : name(op_name), quantized(is_quantized), inputs(std::move(input_types)), outputs(std::move(output_types)) {}
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return Guarded([&] { *kernel = new Status<Kernel>(info, quantized); });
  }
  const char* GetName() const { return name; }
  size_t GetInputTypeCount() const { return inputs.size(); }
  Type GetInputType(size_t index) const { return inputs.at(index); }
  size_t GetOutputTypeCount() const { return outputs.size(); }
  Type GetOutputType(size_t index) const { return outputs.at(index); }
};

// The operators live as long as the library: sessions keep pointers to them.
class Registry {
 public:
  Registry() : domain("ai.mythos") {
    ForWeights("NormalizedLinear", "QuantizedNormalizedLinear", {{kInt8}, {kInt4}, {kFloat8}}, [&](auto name, bool quantized, const Types& w) {
      Add<NormalizedLinearKernel>(name, quantized, Join({{kFloat, kFloat}, w}), {kFloat});
    });
    ForWeights("ResidualLinear", "QuantizedResidualLinear", {{kInt8}, {kInt4}, {kFloat8}}, [&](auto name, bool quantized, const Types& w) {
      Add<ResidualLinearKernel>(name, quantized, Join({{kFloat, kFloat}, w}), {kFloat});
    });
    // A matrix with an odd number of input channels stays int8 where the others are int4.
    const std::vector<Types> pairs = {{kInt8, kInt8}, {kInt4, kInt4}, {kInt4, kInt8}, {kInt8, kInt4}, {kFloat8, kFloat8}};
    ForWeights("FeedForward", "QuantizedFeedForward", pairs, [&](auto name, bool quantized, const Types& w) {
      Add<FeedForwardKernel>(name, quantized, Join({{kFloat, kFloat}, w}), {kFloat});
    });
    ForWeights("MixtureOfExperts", "QuantizedMixtureOfExperts", {{kInt8, kInt8}, {kPackedInt4, kPackedInt4}, {kFloat8, kFloat8}},
               [&](auto name, bool quantized, const Types& w) {
                 Add<MixtureOfExpertsKernel>(name, quantized, Join({{kFloat, kFloat, kFloat, kFloat}, w}), {kFloat});
               });
    for (const Type cache : {kFloat, kHalf, kBFloat16, kInt8}) {
      const Types past = cache == kInt8 ? Types{kInt8, kFloat, kInt, kInt} : Types{cache, kInt, kInt};
      const Types outputs = cache == kInt8 ? Types{kFloat, kInt8, kFloat} : Types{kFloat, cache};
      const bool int8 = cache == kInt8;
      ForWeights(int8 ? "LatentAttentionInt8Cache" : "LatentAttention",
                 int8 ? "QuantizedLatentAttentionInt8Cache" : "QuantizedLatentAttention", pairs,
                 [&](auto name, bool quantized, const Types& w) {
                   Add<LatentAttentionKernel>(name, quantized, Join({{kFloat, kFloat, kFloat}, w, {kFloat, kFloat}, past}),
                                              outputs);
                 });
      Add<GroupedQueryAttentionKernel>(int8 ? "GroupedQueryAttentionInt8Cache" : "GroupedQueryAttention", false,
                                       Join({{kFloat, kFloat, kFloat}, past}), outputs);
    }
    Add<RecurrentInputKernel>("RecurrentInput", false, {kFloat, kFloat, kFloat, kFloat, kInt}, {kFloat});
    Add<RecurrentUpdateKernel>("RecurrentUpdate", false,
                               {kFloat, kFloat, kFloat, kFloat, kFloat, kInt, kInt, kInt, kFloat, kFloat, kFloat, kFloat, kFloat,
                                kFloat, kFloat},
                               {kFloat, kFloat, kFloat, kInt});
  }
  Ort::CustomOpDomain domain;

 private:
  using Types = std::vector<Type>;

  static Types Join(std::initializer_list<Types> parts) {
    Types all;
    for (const Types& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  }

  // The float form of an operator, and the quantized one for every choice of types of its matrices and their scales.
  template <typename Each>
  void ForWeights(const char* name, const char* quantized_name, const std::vector<Types>& choices, const Each& each) {
    each(name, false, Types(choices[0].size(), kFloat));
    for (const Types& weights : choices)
      for (const Type scales : {kFloat, kHalf}) {
        Types with_scales;
        for (const Type weight : weights) with_scales.insert(with_scales.end(), {weight, scales});
        each(quantized_name, true, with_scales);
      }
  }

  // Quantized forms end with activation_scale.
  template <typename Kernel>
  void Add(const char* name, bool quantized, Types inputs, Types outputs) {
    if (quantized) inputs.push_back(kFloat);
    auto op = std::make_shared<Operator<Kernel>>(name, quantized, std::move(inputs), std::move(outputs));
    domain.Add(op.get());
    operators_.push_back(std::move(op));
  }

  std::deque<std::shared_ptr<OrtCustomOp>> operators_;
};

}  // namespace
}  // namespace mythos::onnxruntime

extern "C" {

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr)  // this onnxruntime is older than the headers
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "the library was built with the headers of a newer onnxruntime");
  Ort::InitApi(api);
  static const mythos::onnxruntime::Registry registry;
  return Ort::GetApi().AddCustomOpDomain(options, registry.domain);
}

// The instruction set in use: the name of its table (see dispatch.cc).
__attribute__((visibility("default"))) const char* mythos_instruction_set() { return mythos::CurrentKernels().name; }

// Uses another one in the whole process, for tests; 0 where this processor lacks it.
__attribute__((visibility("default"))) int mythos_use_instruction_set(const char* name) { return mythos::UseKernels(name); }

}  // extern "C"
