// The operators as onnxruntime custom operators of the domain ai.mythos: their names and types, and how onnxruntime reaches them.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "onnxruntime_attention.h"
#include "onnxruntime_layers.h"

namespace mythos::onnxruntime {

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

// An input or output. on_host: in the processor's memory whatever the device. variadic: the last input, any number of times.
struct Typed {
  Type type;
  bool on_host = false, variadic = false;
  Typed(Type type) : type(type) {}
  Typed(Type type, bool on_host, bool variadic) : type(type), on_host(on_host), variadic(variadic) {}
};
using Types = std::vector<Typed>;

inline Typed OnHost(Type type) { return {type, true, false}; }
inline Typed Variadic(Type type) { return {type, false, true}; }

inline Types Join(std::initializer_list<Types> parts) {
  Types all;
  for (const Types& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// One operator for one choice of types; onnxruntime asks for them one by one.
template <typename Kernel>
struct Operator : Ort::CustomOpBase<Operator<Kernel>, Status<Kernel>, true> {
  const char *name, *provider;
  bool quantized;
  Types inputs, outputs;

  Operator(const char* op_name, const char* op_provider, bool is_quantized, Types input_types, Types output_types)
      : name(op_name), provider(op_provider), quantized(is_quantized), inputs(std::move(input_types)), outputs(std::move(output_types)) {}
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return Guarded([&] { *kernel = new Status<Kernel>(info, quantized); });
  }
  const char* GetName() const { return name; }
  const char* GetExecutionProviderType() const { return provider; }
  size_t GetInputTypeCount() const { return inputs.size(); }
  Type GetInputType(size_t index) const { return inputs.at(index).type; }
  OrtMemType GetInputMemoryType(size_t index) const {
    return provider != nullptr && inputs.at(index).on_host ? OrtMemTypeCPUInput : OrtMemTypeDefault;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return inputs.at(index).variadic ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return outputs.size(); }
  Type GetOutputType(size_t index) const { return outputs.at(index).type; }
};

// The operators of one device, which says its provider's name (null: the processor's), the dtypes of float matrices and of caches,
// whether its attention takes quantized matrices, and runs what the kernels ask of it. They live as long as the library: sessions keep pointers
// to them.
template <typename Device>
class Registry {
 public:
  Registry() : domain("ai.mythos") {
    ForLinear("NormalizedLinear", "QuantizedNormalizedLinear", [&](auto name, bool quantized, const Types& w) {
      Add<NormalizedLinearKernel<Device>>(name, quantized, Join({{kFloat, kFloat}, w}), {kFloat});
    });
    ForLinear("ResidualLinear", "QuantizedResidualLinear", [&](auto name, bool quantized, const Types& w) {
      Add<ResidualLinearKernel<Device>>(name, quantized, Join({{kFloat, kFloat}, w}), {kFloat});
    });
    // A matrix with an odd number of input channels stays int8 where the others are int4.
    const std::vector<Types> pairs = {{kInt8, kInt8}, {kInt4, kInt4}, {kInt4, kInt8}, {kInt8, kInt4}, {kFloat8, kFloat8}};
    ForWeights("FeedForward", "QuantizedFeedForward", pairs, [&](auto name, bool quantized, const Types& w) {
      Add<FeedForwardKernel<Device>>(name, quantized, Join({{kFloat, kFloat}, w}), {kFloat});
    });
    ForWeights("MixtureOfExperts", "QuantizedMixtureOfExperts", {{kInt8, kInt8}, {kPackedInt4, kPackedInt4}, {kFloat8, kFloat8}},
               [&](auto name, bool quantized, const Types& w) {
                 Add<MixtureOfExpertsKernel<Device>>(name, quantized, Join({{kFloat, kFloat, kFloat, kFloat}, w}), {kFloat});
               });
    for (const Type cache : Device::Caches()) {
      const Typed slot = OnHost(kInt);
      const Types past = cache == kInt8 ? Types{kInt8, kFloat, kInt, slot} : Types{cache, kInt, slot};
      const Types outputs = cache == kInt8 ? Types{kFloat, kInt8, kFloat} : Types{kFloat, cache};
      const bool int8 = cache == kInt8;
      ForWeights(int8 ? "LatentAttentionInt8Cache" : "LatentAttention",
                 int8 ? "QuantizedLatentAttentionInt8Cache" : "QuantizedLatentAttention", pairs,
                 [&](auto name, bool quantized, const Types& w) {
                   if (quantized && !Device::kQuantizedAttention) return;
                   Add<LatentAttentionKernel<Device>>(name, quantized, Join({{kFloat, kFloat, kFloat}, w, {kFloat, kFloat}, past}),
                                                      outputs);
                 });
      Add<GroupedQueryAttentionKernel<Device>>(int8 ? "GroupedQueryAttentionInt8Cache" : "GroupedQueryAttention", false,
                                               Join({{kFloat, kFloat, kFloat}, past}), outputs);
    }
    const Typed loop = OnHost(kInt);
    Add<RecurrentInputKernel<Device>>("RecurrentInput", false, {kFloat, kFloat, kFloat, kFloat, loop}, {kFloat});
    Add<RecurrentUpdateKernel<Device>>("RecurrentUpdate", false, UpdateInputs(), {kFloat, kFloat, kFloat, kInt});
  }
  Ort::CustomOpDomain domain;

 protected:
  static Types UpdateInputs() {
    return {kFloat, kFloat, kFloat, kFloat, kFloat, kInt, OnHost(kInt), kInt,
            kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, OnHost(kFloat)};
  }

  template <typename Each>
  void ForLinear(const char* name, const char* quantized_name, const Each& each) {
    ForWeights(name, quantized_name, {{kInt8}, {kInt4}, {kFloat8}}, each);
  }

  // The float forms of an operator, and the quantized one for every choice of types of its matrices and their scales.
  template <typename Each>
  void ForWeights(const char* name, const char* quantized_name, const std::vector<Types>& choices, const Each& each) {
    for (const Type floats : Device::Floats()) each(name, false, Types(choices[0].size(), floats));
    for (const Types& weights : choices)
      for (const Type scales : {kFloat, kHalf}) {
        Types with_scales;
        for (const Typed& weight : weights) with_scales.insert(with_scales.end(), {weight, scales});
        each(quantized_name, true, with_scales);
      }
  }

  // Quantized forms end with activation_scale.
  template <typename Kernel>
  void Add(const char* name, bool quantized, Types inputs, Types outputs) {
    if (quantized) inputs.push_back(OnHost(kFloat));
    AddAs<Kernel>(name, quantized, std::move(inputs), std::move(outputs));
  }

  // The inputs as they are.
  template <typename Kernel>
  void AddAs(const char* name, bool quantized, Types inputs, Types outputs) {
    auto op = std::make_shared<Operator<Kernel>>(name, Device::kProvider, quantized, std::move(inputs), std::move(outputs));
    domain.Add(op.get());
    operators_.push_back(std::move(op));
  }

 private:
  std::deque<std::shared_ptr<OrtCustomOp>> operators_;
};

// What the library's RegisterCustomOps does with its only registry.
template <typename Operators>
OrtStatus* Register(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr)  // this onnxruntime is older than the headers
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "the library was built with the headers of a newer onnxruntime");
  Ort::InitApi(api);
  static const Operators registry;
  return Ort::GetApi().AddCustomOpDomain(options, registry.domain);
}

}  // namespace mythos::onnxruntime
