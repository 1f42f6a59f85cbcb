// What the operators' kernels need of onnxruntime on any device: tensors in and out, attributes.
#pragma once
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "operators.h"

namespace mythos::onnxruntime {

using Type = ONNXTensorElementDataType;
constexpr Type kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
               kBFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, kInt = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
               kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, kInt4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4,
               kFloat8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN, kPackedInt4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

inline void Require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("ai.mythos: ") + what);
}

// An input and its shape, without a heap allocation of our own.
class Input {
 public:
  Input(const Ort::KernelContext& context, size_t index) : value_(context.GetInput(index)) {
    const auto info = value_.GetTensorTypeAndShapeInfo();
    type_ = info.GetElementType();
    rank_ = info.GetDimensionsCount();
    Require(rank_ <= kMaxRank, "a tensor has too many dimensions");
    Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, shape_, rank_));
  }
  size_t rank() const { return rank_; }
  size_t dim(size_t axis) const {
    Require(axis < rank_, "a tensor has too few dimensions");
    return static_cast<size_t>(shape_[axis]);
  }
  // Counted from the end: back(0) is the last dimension.
  size_t back(size_t axis) const {
    Require(axis < rank_, "a tensor has too few dimensions");
    return static_cast<size_t>(shape_[rank_ - 1 - axis]);
  }
  // Product of all dimensions but the last.
  size_t rows() const {
    size_t n = 1;
    for (size_t axis = 0; axis + 1 < rank_; ++axis) n *= static_cast<size_t>(shape_[axis]);
    return n;
  }
  size_t size() const { return rank_ == 0 ? 1 : rows() * back(0); }
  const int64_t* shape() const { return shape_; }
  Type type() const { return type_; }
  const void* data() const { return value_.GetTensorRawData(); }
  const float* floats() const { return value_.GetTensorData<float>(); }
  const int64_t* ints() const { return value_.GetTensorData<int64_t>(); }

 private:
  static constexpr size_t kMaxRank = 6;
  Ort::ConstValue value_;
  Type type_;
  size_t rank_;
  int64_t shape_[kMaxRank] = {};
};

// Inputs in the order of the operator's schema.
class Inputs {
 public:
  explicit Inputs(OrtKernelContext* context) : context_(context) {}
  Input Next() { return Input(context_, next_++); }

 private:
  Ort::KernelContext context_;
  size_t next_ = 0;
};

template <typename T>
T* Output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank) {
  return Ort::KernelContext(context).GetOutput(index, shape, rank).GetTensorMutableData<T>();
}

// An output of x's shape, its last dimension another.
inline float* OutputLike(OrtKernelContext* context, size_t index, const Input& x, size_t last) {
  int64_t shape[8];
  std::copy_n(x.shape(), x.rank(), shape);
  shape[x.rank() - 1] = static_cast<int64_t>(last);
  return Output<float>(context, index, shape, x.rank());
}

template <typename T>
T Attribute(const OrtKernelInfo* info, const char* name) {
  return Ort::ConstKernelInfo(info).GetAttribute<T>(name);
}

// The same of one that a node may lack.
template <typename T>
T Attribute(const OrtKernelInfo* info, const char* name, T otherwise) {
  try {
    return Attribute<T>(info, name);
  } catch (const Ort::Exception&) {
    return otherwise;
  }
}

// How an operator's matrices are stored: as attributes of the quantized form say, or as floats where it has none.
struct WeightForm {
  bool quantized;
  size_t block = 0;
  ActivationType activation_type = ActivationType::kFloat32;

  WeightForm(const OrtKernelInfo* info, bool is_quantized) : quantized(is_quantized) {
    if (!quantized) return;
    block = static_cast<size_t>(Attribute<int64_t>(info, "block_size"));
    Require(block == 32 || block == 64 || block == 128, "block_size is not 32, 64 or 128");
    switch (Attribute<int64_t>(info, "activation_type")) {  // of onnx.TensorProto
      case 1: activation_type = ActivationType::kFloat32; break;
      case 3: activation_type = ActivationType::kInt8; break;
      case 17: activation_type = ActivationType::kFloat8; break;
      default: Require(false, "activation_type is not 1 (FLOAT), 3 (INT8) or 17 (FLOAT8E4M3FN)");
    }
  }

  // Matrices [..., n, k], and in the quantized form their scales, from the next inputs. `count` gets how many are stacked.
  Matrix Read(Inputs& in, size_t* count = nullptr) const {
    const Input values = in.Next();
    Matrix w;
    w.values = values.data();
    w.n = values.back(1), w.k = values.back(0);
    if (count != nullptr) *count = values.rows() / std::max<size_t>(1, w.n);
    if (!quantized) {
      w.type = values.type() == kHalf ? WeightType::kFloat16 : values.type() == kBFloat16 ? WeightType::kBFloat16 : WeightType::kFloat32;
      return w;
    }
    const Input scales = in.Next();
    w.scales = scales.data();
    w.half_scales = scales.type() == kHalf;
    w.block = block, w.activation_type = activation_type;
    w.type = values.type() == kInt8     ? WeightType::kInt8
             : values.type() == kFloat8 ? WeightType::kFloat8
                                        : WeightType::kInt4;
    if (values.type() == kPackedInt4) w.k *= 2;  // two int4 a byte
    Require(w.type != WeightType::kInt4 || w.k % 2 == 0, "int4 weights need an even number of input channels");
    Require(scales.back(0) == CeilDiv(w.k, block) && scales.rows() == values.rows(), "scales do not fit their weights");
    return w;
  }

  // The static scales of the matrices' inputs, from the last input of the quantized form: one for each, or none.
  void ReadActivationScales(Inputs& in, std::initializer_list<Matrix*> matrices) const {
    if (!quantized) return;
    const Input scales = in.Next();
    if (activation_type == ActivationType::kFloat32) return;
    Require(scales.size() > 0 || activation_type == ActivationType::kInt8, "activation_scale is empty; FLOAT8E4M3FN needs static scales");
    if (scales.size() == 0) return;
    Require(scales.size() == matrices.size(), "activation_scale needs one scale for every matrix, or none at all");
    const float* scale = scales.floats();
    for (Matrix* w : matrices) {
      Require(*scale > 0.0f && std::isfinite(*scale), "activation_scale holds a scale that is not positive and finite");
      w->activation_scale = *scale++;
    }
  }
};

}  // namespace mythos::onnxruntime
