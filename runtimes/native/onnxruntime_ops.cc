// The operators as onnxruntime custom operators of the domain ai.mythos: shapes in, plain memory to the algorithms.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "operators.h"

namespace {

using Shape = std::vector<int64_t>;

struct Input {
  Ort::ConstValue value;
  Shape shape;
  Input(const Ort::KernelContext& context, size_t index)
      : value(context.GetInput(index)), shape(value.GetTensorTypeAndShapeInfo().GetShape()) {}
  size_t dim(size_t axis) const { return static_cast<size_t>(shape.at(axis)); }
  const float* floats() const { return value.GetTensorData<float>(); }
  const int64_t* ints() const { return value.GetTensorData<int64_t>(); }
};

void Require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("ai.mythos: ") + what);
}

mythos::Parallel HostThreads(OrtKernelContext* context) {
  return {context, [](void* host, void (*task)(void*, size_t), size_t n, void* data) {
            Ort::KernelContext(static_cast<OrtKernelContext*>(host)).ParallelFor(task, n, 0, data);
          }};
}

// This layer's rows of past_kv [slots, B, C, W], read where they lie.
const float* SlotOf(const Input& past_kv, const Input& slot) {
  const int64_t index = slot.ints()[0];
  Require(index >= 0 && index < past_kv.shape.at(0), "slot is outside past_kv");
  return past_kv.floats() + static_cast<size_t>(index) * past_kv.dim(1) * past_kv.dim(2) * past_kv.dim(3);
}

void RequireLengths(const Input& past_len, size_t batch, size_t capacity) {
  Require(past_len.dim(0) == batch, "past_len needs one length a sequence");
  for (size_t b = 0; b < batch; ++b)
    Require(past_len.ints()[b] >= 0 && static_cast<size_t>(past_len.ints()[b]) <= capacity,
            "past_len is negative or beyond the cache's capacity");
}

struct LatentAttentionKernel {
  float scale, epsilon;
  explicit LatentAttentionKernel(const OrtKernelInfo* info)
      : scale(Ort::ConstKernelInfo(info).GetAttribute<float>("scale")),
        epsilon(Ort::ConstKernelInfo(info).GetAttribute<float>("epsilon")) {}

  void Compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const Input q(context, 0), kv(context, 1), kv_norm(context, 2), w_uk(context, 3), w_uv(context, 4), cos(context, 5),
        sin(context, 6), past_kv(context, 7), past_len(context, 8), slot(context, 9);
    mythos::LatentAttentionArgs a{};
    a.batch = q.dim(0), a.seq = q.dim(1);
    a.n_heads = w_uk.dim(0), a.nope = w_uk.dim(1), a.rank = w_uk.dim(2), a.v_head_dim = w_uv.dim(1);
    a.rope = kv.dim(2) - a.rank, a.capacity = past_kv.dim(2);
    Require(q.dim(2) == a.n_heads * (a.nope + a.rope), "q does not fit w_uk and kv");
    Require(past_kv.dim(1) == a.batch && past_kv.dim(3) == a.rank + a.rope, "past_kv does not fit kv");
    Require(cos.dim(2) * 2 == a.rope && sin.dim(2) * 2 == a.rope, "cos and sin do not fit kv");
    RequireLengths(past_len, a.batch, a.capacity);
    a.scale = scale, a.epsilon = epsilon;
    a.q = q.floats(), a.kv = kv.floats(), a.kv_norm = kv_norm.floats(), a.w_uk = w_uk.floats(), a.w_uv = w_uv.floats();
    a.cos = cos.floats(), a.sin = sin.floats(), a.past = SlotOf(past_kv, slot), a.past_len = past_len.ints();
    a.y = context.GetOutput(0, Shape{q.shape[0], q.shape[1], static_cast<int64_t>(a.n_heads * a.v_head_dim)})
              .GetTensorMutableData<float>();
    a.new_kv = context.GetOutput(1, kv.shape).GetTensorMutableData<float>();
    if (a.batch * a.seq > 0) mythos::LatentAttention(a, mythos::CurrentKernels(), HostThreads(raw));
  }
};

struct GroupedQueryAttentionKernel {
  int64_t n_heads, n_kv_heads;
  float scale;
  explicit GroupedQueryAttentionKernel(const OrtKernelInfo* info)
      : n_heads(Ort::ConstKernelInfo(info).GetAttribute<int64_t>("n_heads")),
        n_kv_heads(Ort::ConstKernelInfo(info).GetAttribute<int64_t>("n_kv_heads")),
        scale(Ort::ConstKernelInfo(info).GetAttribute<float>("scale")) {}

  void Compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const Input qkv(context, 0), cos(context, 1), sin(context, 2), past_kv(context, 3), past_len(context, 4), slot(context, 5);
    mythos::GroupedQueryAttentionArgs a{};
    a.batch = qkv.dim(0), a.seq = qkv.dim(1);
    a.n_heads = static_cast<size_t>(n_heads), a.n_kv_heads = static_cast<size_t>(n_kv_heads);
    a.head_dim = qkv.dim(2) / (a.n_heads + 2 * a.n_kv_heads), a.capacity = past_kv.dim(2);
    Require(past_kv.dim(1) == a.batch && past_kv.dim(3) == 2 * a.n_kv_heads * a.head_dim, "past_kv does not fit qkv");
    Require(cos.dim(2) * 2 == a.head_dim && sin.dim(2) * 2 == a.head_dim, "cos and sin do not fit qkv");
    RequireLengths(past_len, a.batch, a.capacity);
    a.scale = scale;
    a.qkv = qkv.floats(), a.cos = cos.floats(), a.sin = sin.floats();
    a.past = SlotOf(past_kv, slot), a.past_len = past_len.ints();
    a.y = context.GetOutput(0, Shape{qkv.shape[0], qkv.shape[1], static_cast<int64_t>(a.n_heads * a.head_dim)})
              .GetTensorMutableData<float>();
    a.new_kv = context.GetOutput(1, Shape{qkv.shape[0], qkv.shape[1], past_kv.shape[3]}).GetTensorMutableData<float>();
    if (a.batch * a.seq > 0) mythos::GroupedQueryAttention(a, mythos::CurrentKernels(), HostThreads(raw));
  }
};

struct MixtureOfExpertsKernel {
  int64_t top_k;
  explicit MixtureOfExpertsKernel(const OrtKernelInfo* info)
      : top_k(Ort::ConstKernelInfo(info).GetAttribute<int64_t>("top_k")) {}

  void Compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const Input x(context, 0), router(context, 1), router_bias(context, 2), gate_up(context, 3), down(context, 4);
    mythos::MixtureOfExpertsArgs a{};
    a.n_experts = gate_up.dim(0), a.dim = gate_up.dim(2), a.expert_dim = down.dim(2);
    a.top_k = static_cast<size_t>(top_k);
    a.tokens = 1;
    for (size_t axis = 0; axis + 1 < x.shape.size(); ++axis) a.tokens *= x.dim(axis);
    Require(!x.shape.empty() && x.shape.back() == gate_up.shape[2], "x does not fit gate_up");
    Require(a.top_k >= 1 && a.top_k <= a.n_experts, "top_k is not between 1 and the number of experts");
    Require(router.dim(0) == a.dim && router.dim(1) == a.n_experts && router_bias.dim(0) == a.n_experts &&
                gate_up.dim(1) == 2 * a.expert_dim && down.dim(0) == a.n_experts && down.dim(1) == a.dim,
            "router, gate_up and down do not fit each other");
    a.x = x.floats(), a.router = router.floats(), a.router_bias = router_bias.floats();
    a.gate_up = gate_up.floats(), a.down = down.floats();
    a.y = context.GetOutput(0, x.shape).GetTensorMutableData<float>();
    if (a.tokens > 0) mythos::MixtureOfExperts(a, mythos::CurrentKernels(), HostThreads(raw));
  }
};

constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kInt = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

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

// Name and types of an operator; onnxruntime asks for them one by one.
template <typename Op, typename Kernel>
struct OperatorBase : Ort::CustomOpBase<Op, Status<Kernel>, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return Guarded([&] { *kernel = new Status<Kernel>(info); });
  }
  size_t GetInputTypeCount() const { return Op::kInputs.size(); }
  ONNXTensorElementDataType GetInputType(size_t index) const { return Op::kInputs.at(index); }
  size_t GetOutputTypeCount() const { return Op::kOutputs; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kFloat; }
};

struct LatentAttentionOp : OperatorBase<LatentAttentionOp, LatentAttentionKernel> {
  inline static const std::vector<ONNXTensorElementDataType> kInputs{kFloat, kFloat, kFloat, kFloat, kFloat,
                                                                     kFloat, kFloat, kFloat, kInt,   kInt};
  static constexpr size_t kOutputs = 2;
  const char* GetName() const { return "LatentAttention"; }
};

struct GroupedQueryAttentionOp : OperatorBase<GroupedQueryAttentionOp, GroupedQueryAttentionKernel> {
  inline static const std::vector<ONNXTensorElementDataType> kInputs{kFloat, kFloat, kFloat, kFloat, kInt, kInt};
  static constexpr size_t kOutputs = 2;
  const char* GetName() const { return "GroupedQueryAttention"; }
};

struct MixtureOfExpertsOp : OperatorBase<MixtureOfExpertsOp, MixtureOfExpertsKernel> {
  inline static const std::vector<ONNXTensorElementDataType> kInputs{kFloat, kFloat, kFloat, kFloat, kFloat};
  static constexpr size_t kOutputs = 1;
  const char* GetName() const { return "MixtureOfExperts"; }
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr)  // this onnxruntime is older than the headers
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "the library was built with the headers of a newer onnxruntime");
  Ort::InitApi(api);
  // Operators and their domain live as long as the library: sessions keep pointers to them.
  static const LatentAttentionOp latent_attention;
  static const GroupedQueryAttentionOp grouped_query_attention;
  static const MixtureOfExpertsOp mixture_of_experts;
  static Ort::CustomOpDomain domain{"ai.mythos"};
  static const bool filled = [] {
    domain.Add(&latent_attention);
    domain.Add(&grouped_query_attention);
    domain.Add(&mixture_of_experts);
    return true;
  }();
  (void)filled;
  return Ort::GetApi().AddCustomOpDomain(options, domain);
}

// The instruction set in use: avx512, avx2, neon or scalar.
__attribute__((visibility("default"))) const char* mythos_instruction_set() { return mythos::CurrentKernels().name; }

// Uses another one in the whole process, for tests; 0 where this processor lacks it.
__attribute__((visibility("default"))) int mythos_use_instruction_set(const char* name) { return mythos::UseKernels(name); }

}  // extern "C"
