// A TensorRT plugin (IPluginV3, TensorRT 10 and later) of an operator: everything of the interface that is the same for all of them.
//
// An Operator says what its tensors and fields are and launches its kernels:
//   kName, kInputs, kOutputs   its name; a letter a tensor: f float32, l int64, w matrices and c cache rows, each of one dtype of
//                              float32, float16 and bfloat16 (all w of a node alike, and all c)
//   kFields                    its attributes, in the order of Values
//   kRanks                     ranks of the inputs, the first of x [B, S, ...]
//   shapes(in, values, build, out)       extents of the outputs
//   workspace(in, values)                bytes for these inputs or any with fewer tokens; 0 where none is needed
//   launch(in, values, inputs, outputs, workspace, stream)     a cudaError_t
#ifndef MYTHOS_NATIVE_TENSORRT_PLUGIN_H_
#define MYTHOS_NATIVE_TENSORRT_PLUGIN_H_

#include <NvInferRuntime.h>

#include <cstring>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "mythos_cuda.h"

namespace mythos::plugins {

constexpr char kNamespace[] = "ai.mythos", kVersion[] = "1";

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

// An attribute of a node.
struct Field {
  const char* name;
  bool is_float;
};

// Values of a node's attributes, as the fields say.
union Value {
  int32_t integer;
  float number;
};
using Values = std::vector<Value>;

// What a node is given.
struct Tensor {
  Dims dims;
  DataType type;
};
using Tensors = std::vector<Tensor>;

// The dtype of the C interface; -1 for any other.
inline int32_t dtype_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return MYTHOS_CUDA_FLOAT32;
    case DataType::kHALF: return MYTHOS_CUDA_FLOAT16;
    case DataType::kBF16: return MYTHOS_CUDA_BFLOAT16;
    default: return -1;
  }
}

inline int64_t bytes_of(DataType type) { return type == DataType::kFLOAT ? 4 : 2; }  // of matrices and cache rows

inline uint64_t aligned(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

// Whether a tensor of a letter may have a type, the types of all before it being known.
inline bool takes(char letter, DataType type, const std::string& letters, const DynamicPluginTensorDesc* all, int32_t position) {
  if (letter == 'f') return type == DataType::kFLOAT;
  if (letter == 'l') return type == DataType::kINT64;
  for (int32_t before = 0; before < position; ++before) {
    if (letters[before] == letter) return type == all[before].desc.type;
  }
  return dtype_of(type) >= 0;
}

template <typename Operator>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(Values values) : values_(std::move(values)) {
    for (size_t i = 0; i < Operator::kFields.size(); ++i) {
      const Field& field = Operator::kFields[i];
      const auto type = field.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
      fields_.emplace_back(field.name, &values_[i], type, 1);
    }
    collection_ = {int32_t(fields_.size()), fields_.data()};
    timing_id_ = Operator::kName;
    for (const Value& value : values_) timing_id_ += "." + std::to_string(value.integer);
  }

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override {
    try {
      return new Plugin(values_);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }

  const char* getPluginName() const noexcept override { return Operator::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t outputs) noexcept override {
    return inputs == kInputs && outputs == kOutputs ? 0 : 1;
  }
  int32_t getOutputDataTypes(DataType* outputs, int32_t n_outputs, const DataType* inputs, int32_t n_inputs) const noexcept override {
    if (n_inputs != kInputs || n_outputs != kOutputs) return 1;
    for (int32_t i = 0; i < kOutputs; ++i) {
      const char letter = Operator::kOutputs[i];
      outputs[i] = letter == 'l' ? DataType::kINT64 : DataType::kFLOAT;
      if (letter == 'c') outputs[i] = inputs[std::string(Operator::kInputs).find('c')];
    }
    return 0;
  }
  int32_t getOutputShapes(const DimsExprs* inputs, int32_t n_inputs, const DimsExprs*, int32_t, DimsExprs* outputs, int32_t n_outputs,
                          IExprBuilder& build) noexcept override {
    if (n_inputs != kInputs || n_outputs != kOutputs) return 1;
    for (int32_t i = 0; i < kInputs; ++i) {
      if (inputs[i].nbDims != Operator::kRanks[i]) return 1;
    }
    return Operator::shapes(inputs, values_, build, outputs) ? 0 : 1;
  }
  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* all, int32_t inputs, int32_t outputs) noexcept override {
    if (inputs != kInputs || outputs != kOutputs) return false;
    static const std::string letters = std::string(Operator::kInputs) + Operator::kOutputs;
    const PluginTensorDesc& tensor = all[position].desc;
    return tensor.format == nvinfer1::TensorFormat::kLINEAR && takes(letters[position], tensor.type, letters, all, position);
  }
  int32_t getNbOutputs() const noexcept override { return kOutputs; }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t n_inputs, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    Tensors largest;
    for (int32_t i = 0; i < n_inputs; ++i) largest.push_back({inputs[i].max, inputs[i].desc.type});
    return Operator::workspace(largest, values_);
  }
  // A time measured of one node holds for another with the same attributes.
  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t inputs, const PluginTensorDesc*, int32_t outputs) noexcept override {
    return inputs == kInputs && outputs == kOutputs ? 0 : 1;
  }
  int32_t enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    Tensors given;
    for (int32_t i = 0; i < kInputs; ++i) given.push_back({input_descs[i].dims, input_descs[i].type});
    return Operator::launch(given, values_, inputs, outputs, static_cast<char*>(workspace), stream);
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  static constexpr int32_t kInputs = int32_t(std::char_traits<char>::length(Operator::kInputs));
  static constexpr int32_t kOutputs = int32_t(std::char_traits<char>::length(Operator::kOutputs));
  static_assert(kInputs == int32_t(Operator::kRanks.size()), "a rank an input");

  Values values_;
  std::string timing_id_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

template <typename Operator>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    for (const Field& field : Operator::kFields) {
      fields_.emplace_back(field.name, nullptr, field.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
    }
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }

  // Null where a field is missing or is not what it should be.
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given, nvinfer1::TensorRTPhase) noexcept override {
    try {
      Values values(Operator::kFields.size());
      for (size_t i = 0; i < values.size(); ++i) {
        if (given == nullptr || !read(Operator::kFields[i], *given, values[i])) return nullptr;
      }
      return new Plugin<Operator>(std::move(values));
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Operator::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  static bool read(const Field& field, const nvinfer1::PluginFieldCollection& given, Value& value) {
    const auto type = field.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
    for (int32_t i = 0; i < given.nbFields; ++i) {
      const nvinfer1::PluginField& found = given.fields[i];
      if (std::strcmp(found.name, field.name) != 0) continue;
      if (found.type != type || found.length != 1 || found.data == nullptr) return false;
      std::memcpy(&value, found.data, sizeof(value));
      return true;
    }
    return false;
  }

  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace mythos::plugins
#endif  // MYTHOS_NATIVE_TENSORRT_PLUGIN_H_
