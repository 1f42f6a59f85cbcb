// The TensorRT plugins without TensorRT: each is made by its creator, asked for types, formats, shapes and workspace, written out and read
// back, and (with "device") enqueued on device memory, whose results are held against sums in double on the host.
//
//   tensorrt_plugins host|device
#include <NvInferRuntime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

using namespace nvinfer1;
using Doubles = std::vector<double>;

int failures = 0;

void check(bool right, const std::string& what) {
  if (right) return;
  std::printf("WRONG: %s\n", what.c_str());
  ++failures;
}

void cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}

// Numbers of a tensor as they are stored: rounded to its type.
struct Tensor {
  DataType type;
  std::vector<int64_t> shape;
  Doubles values;

  int64_t size() const { return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>()); }
  Dims dims() const {
    Dims dims{int32_t(shape.size()), {}};
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
  }
};

int64_t bytes_of(DataType type) { return type == DataType::kINT64 ? 8 : type == DataType::kFLOAT ? 4 : 2; }

void store(DataType type, double value, char* at) {
  if (type == DataType::kFLOAT) { const float v = float(value); std::memcpy(at, &v, 4); }
  if (type == DataType::kHALF) { const __half v = __float2half(float(value)); std::memcpy(at, &v, 2); }
  if (type == DataType::kBF16) { const __nv_bfloat16 v = __float2bfloat16(float(value)); std::memcpy(at, &v, 2); }
  if (type == DataType::kINT64) { const int64_t v = int64_t(value); std::memcpy(at, &v, 8); }
}

double load(DataType type, const char* at) {
  if (type == DataType::kFLOAT) { float v; std::memcpy(&v, at, 4); return v; }
  if (type == DataType::kHALF) { __half v; std::memcpy(&v, at, 2); return __half2float(v); }
  if (type == DataType::kBF16) { __nv_bfloat16 v; std::memcpy(&v, at, 2); return __bfloat162float(v); }
  int64_t v;
  std::memcpy(&v, at, 8);
  return double(v);
}

std::mt19937 generator(7);

Tensor numbers(DataType type, std::vector<int64_t> shape, double deviation = 1, double mean = 0) {
  Tensor tensor{type, std::move(shape), {}};
  std::normal_distribution<double> draw(mean, deviation);
  char stored[8];
  for (int64_t i = 0; i < tensor.size(); ++i) {
    store(type, draw(generator), stored);
    tensor.values.push_back(load(type, stored));
  }
  return tensor;
}
Tensor floats(std::vector<int64_t> shape, double deviation = 1, double mean = 0) { return numbers(DataType::kFLOAT, std::move(shape), deviation, mean); }
Tensor integers(std::vector<int64_t> shape, Doubles values) { return {DataType::kINT64, std::move(shape), std::move(values)}; }

// --- an expression builder of plain numbers

struct Number final : IDimensionExpr, apiv::VDimensionExpr {
  explicit Number(int64_t number) : number(number) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return number; }
  bool isSizeTensor() const override { return false; }
  int64_t number;
};

struct Builder final : IExprBuilder, apiv::VExprBuilder {
  Builder() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override { return keep(value); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
    const int64_t x = a.getConstantValue(), y = b.getConstantValue();
    if (op == DimensionOperation::kPROD) return keep(x * y);
    if (op == DimensionOperation::kFLOOR_DIV) return keep(x / y);
    std::abort();
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override { std::abort(); }
  const IDimensionExpr* keep(int64_t value) {
    kept.push_back(std::make_unique<Number>(value));
    return kept.back().get();
  }
  std::vector<std::unique_ptr<Number>> kept;
};

// --- one case

struct Attribute {
  const char* name;
  bool is_float;
  double value;
};

struct Case {
  const char* name;
  std::vector<Attribute> attributes;
  std::vector<Tensor> inputs;
  std::vector<Tensor> wanted;  // outputs in double
  double tolerance;            // of the largest wanted value
};

IPluginCreatorV3One* creator_of(const std::string& name) {
  int32_t count = 0;
  auto* const* creators = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (name == creator->getPluginName()) return creator;
  }
  return nullptr;
}

IPluginV3* make(const Case& c) {
  IPluginCreatorV3One* creator = creator_of(c.name);
  check(creator != nullptr, std::string(c.name) + " has a creator");
  if (creator == nullptr) return nullptr;
  check(std::string(creator->getPluginNamespace()) == "ai.mythos" && std::string(creator->getPluginVersion()) == "1", "namespace and version");
  std::vector<float> numbers(c.attributes.size());
  std::vector<int32_t> whole(c.attributes.size());
  std::vector<PluginField> fields;
  for (size_t i = c.attributes.size(); i-- > 0;) {  // in another order than the creator's
    const Attribute& a = c.attributes[i];
    numbers[i] = float(a.value), whole[i] = int32_t(a.value);
    const void* data = a.is_float ? static_cast<const void*>(&numbers[i]) : &whole[i];
    fields.emplace_back(a.name, data, a.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
  }
  check(creator->getFieldNames()->nbFields == int32_t(fields.size()), std::string(c.name) + " names its fields");
  const PluginFieldCollection all{int32_t(fields.size()), fields.data()};
  if (!fields.empty()) {
    const PluginFieldCollection fewer{int32_t(fields.size()) - 1, fields.data()};
    check(creator->createPlugin("n", &fewer, TensorRTPhase::kBUILD) == nullptr, std::string(c.name) + " wants every field");
    std::vector<PluginField> other = fields;
    other[0].type = PluginFieldType::kINT8;
    const PluginFieldCollection mistyped{int32_t(other.size()), other.data()};
    check(creator->createPlugin("n", &mistyped, TensorRTPhase::kBUILD) == nullptr, std::string(c.name) + " wants fields of their types");
  }
  std::unique_ptr<IPluginV3> first(creator->createPlugin("n", &all, TensorRTPhase::kBUILD));
  if (first == nullptr) return nullptr;
  // Written out, read back, copied, attached: still the same.
  auto* runtime = static_cast<IPluginV3OneRuntime*>(first->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  std::unique_ptr<IPluginV3> read(creator->createPlugin("n", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  if (read == nullptr) return nullptr;
  std::unique_ptr<IPluginV3> copy(read->clone());
  return static_cast<IPluginV3OneRuntime*>(copy->getCapabilityInterface(PluginCapabilityType::kRUNTIME))->attachToContext(nullptr);
}

std::vector<DynamicPluginTensorDesc> descriptions(const Case& c) {
  std::vector<DynamicPluginTensorDesc> all;
  for (const auto* tensors : {&c.inputs, &c.wanted}) {
    for (const Tensor& t : *tensors) {
      DynamicPluginTensorDesc d{};
      d.desc.dims = d.min = d.max = d.opt = t.dims();
      d.desc.type = t.type, d.desc.format = TensorFormat::kLINEAR, d.desc.scale = -1;
      all.push_back(d);
    }
  }
  return all;
}

void check_build(const Case& c, IPluginV3& plugin) {
  auto& core = *static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
  auto& build = *static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
  const std::string name = c.name;
  check(name == core.getPluginName(), name + " has its name");
  const auto all = descriptions(c);
  const int32_t inputs = int32_t(c.inputs.size()), outputs = int32_t(c.wanted.size());
  check(build.getNbOutputs() == outputs, name + " outputs");
  check(build.configurePlugin(all.data(), inputs, all.data() + inputs, outputs) == 0, name + " is configured");
  check(build.configurePlugin(all.data(), inputs - 1, all.data() + inputs, outputs) != 0, name + " counts its inputs");
  std::vector<DataType> given, types(outputs);
  for (const Tensor& t : c.inputs) given.push_back(t.type);
  check(build.getOutputDataTypes(types.data(), outputs, given.data(), inputs) == 0, name + " types");
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    check(build.supportsFormatCombination(i, all.data(), inputs, outputs), name + " takes tensor " + std::to_string(i));
    auto other = all;
    other[i].desc.type = DataType::kINT8;
    check(!build.supportsFormatCombination(i, other.data(), inputs, outputs), name + " refuses int8 as tensor " + std::to_string(i));
    other = all;
    other[i].desc.format = TensorFormat::kCHW2;
    check(!build.supportsFormatCombination(i, other.data(), inputs, outputs), name + " refuses another format");
    if (i >= inputs) check(types[i - inputs] == c.wanted[i - inputs].type, name + " type of an output");
  }
  const bool works = build.getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs) > 0;
  check(works != (name.rfind("Recurrent", 0) == 0), name + " says what it works in");
  Builder builder;
  std::vector<DimsExprs> shapes(inputs + outputs);
  for (int32_t i = 0; i < inputs; ++i) {
    shapes[i].nbDims = int32_t(c.inputs[i].shape.size());
    for (int32_t d = 0; d < shapes[i].nbDims; ++d) shapes[i].d[d] = builder.keep(c.inputs[i].shape[d]);
  }
  check(build.getOutputShapes(shapes.data(), inputs, nullptr, 0, shapes.data() + inputs, outputs, builder) == 0, name + " shapes");
  for (int32_t i = 0; i < outputs; ++i) {
    const DimsExprs& found = shapes[inputs + i];
    bool same = found.nbDims == int32_t(c.wanted[i].shape.size());
    for (int32_t d = 0; same && d < found.nbDims; ++d) same = found.d[d]->getConstantValue() == c.wanted[i].shape[d];
    check(same, name + " shape of output " + std::to_string(i));
  }
  shapes[0].nbDims += 1;
  check(build.getOutputShapes(shapes.data(), inputs, nullptr, 0, shapes.data() + inputs, outputs, builder) != 0, name + " knows ranks");
}

void run(const Case& c, IPluginV3& plugin) {
  auto& build = *static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto& runtime = *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  const auto all = descriptions(c);
  const int32_t n_inputs = int32_t(c.inputs.size()), n_outputs = int32_t(c.wanted.size());
  std::vector<PluginTensorDesc> descs;
  for (const auto& d : all) descs.push_back(d.desc);
  std::vector<void*> memory;
  for (size_t i = 0; i < all.size(); ++i) {
    const bool is_input = i < c.inputs.size();
    const Tensor& t = is_input ? c.inputs[i] : c.wanted[i - n_inputs];
    std::vector<char> host(std::max<int64_t>(1, t.size() * bytes_of(t.type)), '\xff');
    for (int64_t at = 0; is_input && at < t.size(); ++at) store(t.type, t.values[at], &host[at * bytes_of(t.type)]);
    memory.push_back(nullptr);
    cuda(cudaMalloc(&memory.back(), host.size()));
    cuda(cudaMemcpy(memory.back(), host.data(), host.size(), cudaMemcpyHostToDevice));
  }
  constexpr size_t kGuard = 4096;
  const size_t bytes = build.getWorkspaceSize(all.data(), n_inputs, all.data() + n_inputs, n_outputs);
  char* workspace = nullptr;
  cuda(cudaMalloc(reinterpret_cast<void**>(&workspace), bytes + kGuard));
  cuda(cudaMemset(workspace, 0xff, bytes + kGuard));
  cudaStream_t stream;
  cuda(cudaStreamCreate(&stream));
  check(runtime.onShapeChange(descs.data(), n_inputs, descs.data() + n_inputs, n_outputs) == 0, std::string(c.name) + " takes the shapes");
  const int32_t error = runtime.enqueue(descs.data(), descs.data() + n_inputs, memory.data(), memory.data() + n_inputs, workspace, stream);
  check(error == 0, std::string(c.name) + ": enqueue says " + cudaGetErrorString(cudaError_t(error)));
  cuda(cudaStreamSynchronize(stream));
  std::vector<unsigned char> guard(kGuard);
  cuda(cudaMemcpy(guard.data(), workspace + bytes, kGuard, cudaMemcpyDeviceToHost));
  for (const unsigned char byte : guard) {
    if (byte != 0xff) { check(false, std::string(c.name) + " writes beyond its workspace"); break; }
  }
  for (int32_t i = 0; i < n_outputs; ++i) {
    const Tensor& want = c.wanted[i];
    std::vector<char> host(want.size() * bytes_of(want.type));
    cuda(cudaMemcpy(host.data(), memory[n_inputs + i], host.size(), cudaMemcpyDeviceToHost));
    double worst = 0, largest = 1e-30;
    for (int64_t at = 0; at < want.size(); ++at) {
      const double difference = std::fabs(load(want.type, &host[at * bytes_of(want.type)]) - want.values[at]);
      worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
      largest = std::max(largest, std::fabs(want.values[at]));
    }
    std::printf("%-22s output %d: %.1e of its largest value\n", c.name, i, worst / largest);
    check(worst <= c.tolerance * largest, std::string(c.name) + " output " + std::to_string(i));
  }
  for (void* part : memory) cuda(cudaFree(part));
  cuda(cudaFree(workspace));
  cuda(cudaStreamDestroy(stream));
}

#include "tensorrt_cases.h"

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || (std::strcmp(argv[1], "host") != 0 && std::strcmp(argv[1], "device") != 0)) {
    std::printf("usage: tensorrt_plugins host|device\n");
    return 2;
  }
  const bool on_device = std::strcmp(argv[1], "device") == 0;
  int count = 0;
  for (const Case& c : cases()) {
    std::unique_ptr<IPluginV3> plugin(make(c));
    check(plugin != nullptr, std::string(c.name) + " is made");
    if (plugin == nullptr) continue;
    check_build(c, *plugin);
    if (on_device) run(c, *plugin);
    ++count;
  }
  std::printf("%d cases, %d wrong\n", count, failures);
  return failures == 0 ? 0 : 1;
}
