// The operators as onnxruntime custom operators of the domain ai.mythos: their names and types, and how onnxruntime reaches them.
#include <deque>
#include <memory>
#include <vector>

#include "onnxruntime_attention.h"
#include "onnxruntime_layers.h"

namespace mythos::onnxruntime {
namespace {

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
