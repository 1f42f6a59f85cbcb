// Products of tokens with weight matrices of any stored type: one call for few tokens and many, float and quantized.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace mythos {

enum class WeightType { kFloat32, kFloat16, kBFloat16, kInt8, kInt4, kFloat8 };  // the 16-bit ones on GPUs alone
enum class ActivationType { kFloat32, kInt8, kFloat8 };

// Weights [n, k] as they are stored, output channels first: output n is the dot product of row n with the input.
struct Matrix {
  WeightType type = WeightType::kFloat32;
  const void* values = nullptr;
  const void* scales = nullptr;  // [n][ceil(k / block)]; none for floats
  bool half_scales = false;
  ActivationType activation_type = ActivationType::kInt8;  // quantized weights only: what their input is rounded to
  float activation_scale = 0.0f;  // of the rounded input; 0, for int8 alone: every block of every token has its own
  size_t n = 0, k = 0, block = 32;

  bool quantized() const { return type == WeightType::kInt8 || type == WeightType::kInt4 || type == WeightType::kFloat8; }
  ActivationType rounds_to() const { return quantized() ? activation_type : ActivationType::kFloat32; }
  // Whether products are sums of integers; all others are computed in float.
  bool integer() const {
    return (type == WeightType::kInt8 || type == WeightType::kInt4) && activation_type == ActivationType::kInt8;
  }
  const float* floats() const { return static_cast<const float*>(values); }
  QuantizedRows rows() const {
    return {static_cast<const uint8_t*>(values), scales, k, block, type == WeightType::kInt4 ? 4 : 8, half_scales};
  }
  // Matrix `index` of a stack of them.
  Matrix At(size_t index) const {
    Matrix one = *this;
    if (quantized()) {
      one.values = rows().row(index * n);
      one.scales = rows().row_scales(index * n);
    } else {
      one.values = static_cast<const char*>(values) + index * n * k * (type == WeightType::kFloat32 ? sizeof(float) : sizeof(uint16_t));
    }
    return one;
  }
};

// Tokens [m, k] made ready for products with matrices of one kind: in rows where they are few, in panels of kPanel where
// they are many; quantized where the products are integer ones. Fill every group of kPanel tokens once.
class Activations {
 public:
  Activations(size_t m, const Matrix& w, const Kernels& kernels)
      : m_(m), k_(w.k), panels_(m >= kFewTokens), integer_(w.integer()), block_(w.block), rounds_to_(w.rounds_to()),
        scale_(w.activation_scale), kernels_(kernels), memory_(Floats(w)) {
    if (!integer_) return;
    tokens_.scales = memory_.get();
    tokens_.offsets = reinterpret_cast<int32_t*>(tokens_.scales + NumScales());
    tokens_.values = reinterpret_cast<int8_t*>(tokens_.offsets + NumOffsets());
  }

  size_t groups() const { return CeilDiv(m_, kPanel); }
  size_t m() const { return m_; }
  size_t k() const { return k_; }
  bool panels() const { return panels_; }
  // Numbers a row of results takes for all tokens: a panel is filled up.
  size_t lanes() const { return panels_ ? groups() * kPanel : m_; }

  // Tokens [first, first + count) of one group; get(i, scratch) returns where token i lies (it may have used the scratch [k]).
  template <typename Get>
  void Fill(size_t group, const Get& get) {
    const size_t first = group * kPanel, count = std::min(kPanel, m_ - first);
    const size_t padded = (k_ + 127) / 128 * 128;
    Scratch scratch(padded + padded / 4 + CeilDiv(k_, 32) + 16);
    float* row = scratch.get();
    int8_t* q = reinterpret_cast<int8_t*>(row + padded);
    float* scales = row + padded + padded / 4;
    if (panels_) ClearGroup(group);
    for (size_t i = 0; i < count; ++i) {
      const float* x = get(first + i, row);
      if (!integer_ && rounds_to_ != ActivationType::kFloat32) {
        Round(x, q, scales, row);
        x = row;
      }
      if (integer_) {
        Quantize(x, q, scales);
        std::memset(q + k_, 0, padded - k_);
        panels_ ? PutQuantizedLane(group, i, q, scales) : PutQuantizedRow(first + i, q, scales);
      } else if (panels_) {
        float* lane = memory_.get() + group * kPanel * k_ + i;
        for (size_t at = 0; at < k_; ++at) lane[at * kPanel] = x[at];
      } else {
        std::memcpy(memory_.get() + (first + i) * k_, x, k_ * sizeof(float));
      }
    }
  }

  // out = x · rows [first, first + n) of w: [m][n], or in panels [group][n][kPanel].
  void Multiply(const Matrix& w, size_t first, size_t n, float* out) const;

  // What token i got of a result of n rows: numbers `stride` apart.
  const float* Result(const float* out, size_t n, size_t i) const {
    return panels_ ? out + i / kPanel * n * kPanel + i % kPanel : out + i * n;
  }
  size_t stride() const { return panels_ ? kPanel : 1; }

 private:
  static constexpr size_t kFewTokens = 5;  // below this, dot products beat panels that are mostly empty

  size_t Floats(const Matrix& w) {
    if (!integer_) return lanes() * k_;
    tokens_.k = w.k, tokens_.block = w.block, tokens_.bits = w.type == WeightType::kInt4 ? 4 : 8;
    return NumScales() + NumOffsets() + lanes() * tokens_.padded_k() / 4;
  }
  size_t NumScales() const { return panels_ ? CeilDiv(groups() * tokens_.blocks() * kPanel, 16) * 16 : m_ * tokens_.padded_blocks(); }
  size_t NumOffsets() const { return panels_ ? NumScales() : m_ * tokens_.padded_offsets(); }

  void Quantize(const float* x, int8_t* q, float* scales) const {
    if (scale_ > 0.0f) {
      kernels_.quantize_static(x, k_, block_, scale_, q, scales);
    } else {
      kernels_.quantize(x, k_, block_, q, scales);
    }
  }
  // out [k] = x rounded, for products in float; q and scales as Quantize wants them. out may be x.
  void Round(const float* x, int8_t* q, float* scales, float* out) const;
  void ClearGroup(size_t group);
  void PutQuantizedRow(size_t token, const int8_t* q, const float* scales);
  void PutQuantizedLane(size_t group, size_t lane, const int8_t* q, const float* scales);

  size_t m_, k_;
  bool panels_, integer_;
  size_t block_;
  ActivationType rounds_to_;
  float scale_;
  const Kernels& kernels_;
  QuantizedTokens tokens_{};
  Scratch memory_;
};

// A group of x's tokens gets rms_norm of the rows [k] that row_of(token) gives.
template <typename RowOf>
void FillNormalized(Activations& x, size_t group, const float* norm, float epsilon, const Kernels& kernels, const RowOf& row_of) {
  x.Fill(group, [&](size_t token, float* scratch) {
    kernels.rms_norm(row_of(token), norm, x.k(), epsilon, scratch);
    return scratch;
  });
}

// All of x's tokens get rms_norm of `rows` [m, k].
inline void FillNormalized(Activations& x, const float* rows, const float* norm, float epsilon, const Kernels& kernels,
                           const Parallel& parallel) {
  ForEach(parallel, x.groups(), [&](size_t group) {
    FillNormalized(x, group, norm, epsilon, kernels, [&](size_t token) { return rows + token * x.k(); });
  });
}

// Rows of a matrix a task takes: enough bytes to be worth a task, few enough to share them evenly.
inline size_t RowsATask(const Matrix& w, size_t m) {
  constexpr size_t kBytes = 256 * 1024;
  const size_t row_bytes = w.quantized() ? w.rows().row_bytes() : w.k * sizeof(float);
  const size_t rows = m > 1 ? 48 : std::max<size_t>(8, kBytes / std::max<size_t>(1, row_bytes) / 8 * 8);
  return std::min(rows, std::max<size_t>(8, CeilDiv(w.n, 32) * 8));
}

// Calls use(token, first, count, values, stride) for pieces of x · w^T that cover every token and output channel once; pieces
// with other channels run at the same time.
template <typename Use>
void ForProducts(const Activations& x, const Matrix& w, const Parallel& parallel, const Use& use) {
  const size_t rows = RowsATask(w, x.m());
  ForEach(parallel, CeilDiv(w.n, rows), [&](size_t task) {
    const size_t first = task * rows, n = std::min(rows, w.n - first);
    Scratch out(x.lanes() * n);
    x.Multiply(w, first, n, out.get());
    for (size_t i = 0; i < x.m(); ++i) use(i, first, n, x.Result(out.get(), n, i), x.stride());
  });
}

}  // namespace mythos
