#include "matmul.h"

#include "float8.h"

namespace mythos {

namespace {

// out[k] = row `row` of w, as floats.
void Dequantize(const Matrix& w, size_t row, const Kernels& kernels, float* out) {
  const QuantizedRows rows = w.rows();
  if (w.type != WeightType::kFloat8) return kernels.dequantize(rows, row, out);
  Scratch scales(rows.blocks());
  if (rows.half_scales) {
    kernels.widen(CacheType::kFloat16, rows.row_scales(row), rows.blocks(), 1.0f, scales.get());
  } else {
    std::memcpy(scales.get(), rows.row_scales(row), rows.blocks() * sizeof(float));
  }
  for (size_t i = 0; i < rows.k; ++i) out[i] = scales.get()[i / rows.block] * Float8ToFloat(rows.row(row)[i]);
}

}  // namespace

void Activations::Round(const float* x, int8_t* q, float* scales, float* out) const {
  if (rounds_to_ == ActivationType::kFloat8) {
    for (size_t i = 0; i < k_; ++i) out[i] = scale_ * RoundToFloat8(x[i] / scale_);
    return;
  }
  Quantize(x, q, scales);
  for (size_t i = 0; i < k_; ++i) out[i] = scales[i / block_] * static_cast<float>(q[i]);
}

void Activations::ClearGroup(size_t group) {
  if (!integer_) {
    std::fill_n(memory_.get() + group * kPanel * k_, kPanel * k_, 0.0f);
    return;
  }
  const size_t scales = tokens_.blocks() * kPanel, values = tokens_.padded_k() * kPanel;
  std::fill_n(tokens_.scales + group * scales, scales, 0.0f);
  std::fill_n(tokens_.offsets + group * scales, scales, 0);
  std::memset(tokens_.values + group * values, 0, values);
}

void Activations::PutQuantizedRow(size_t token, const int8_t* q, const float* scales) {
  float* to = tokens_.scales + token * tokens_.padded_blocks();
  std::memcpy(to, scales, tokens_.blocks() * sizeof(float));
  std::fill(to + tokens_.blocks(), to + tokens_.padded_blocks(), 0.0f);
  kernels_.pack_row(q, tokens_, token);
}

void Activations::PutQuantizedLane(size_t group, size_t lane, const int8_t* q, const float* scales) {
  const bool four = tokens_.bits == 4;
  const size_t blocks = tokens_.blocks(), channels = kernels_.panel_channels, second = channels == 8 ? 4 : 4 * kPanel;
  int8_t* values = tokens_.values + group * tokens_.padded_k() * kPanel + lane * channels;
  for (size_t at = 0; at < tokens_.padded_k(); at += 8) {
    int8_t* quad = values + at * kPanel;
    for (size_t i = 0; i < 4; ++i) {
      quad[i] = q[at + (four ? 2 * i : i)];
      quad[second + i] = q[at + (four ? 2 * i + 1 : 4 + i)];
    }
  }
  const int32_t bias = kernels_.biased(tokens_.bits) ? (four ? 8 : 128) : 0;
  for (size_t b = 0; b < blocks; ++b) {
    int32_t sum = 0;
    for (size_t at = b * tokens_.block; at < std::min(k_, (b + 1) * tokens_.block); ++at) sum += q[at];
    tokens_.scales[(group * blocks + b) * kPanel + lane] = scales[b];
    tokens_.offsets[(group * blocks + b) * kPanel + lane] = -bias * sum;
  }
}

void Activations::Multiply(const Matrix& w, size_t first, size_t n, float* out) const {
  if (integer_) {
    if (!panels_) return kernels_.matmul_quantized(tokens_, m_, w.rows(), first, n, out, n);
    Scratch row_scales(n * tokens_.blocks());
    return kernels_.matmul_quantized_panels(tokens_, groups(), w.rows(), first, n, row_scales.get(), out);
  }
  const float* rows = w.floats() + first * k_;
  Scratch floats(w.quantized() ? n * k_ : 0);
  if (w.quantized()) {
    for (size_t r = 0; r < n; ++r) Dequantize(w, first + r, kernels_, floats.get() + r * k_);
    rows = floats.get();
  }
  if (!panels_) return kernels_.matmul_nt(memory_.get(), k_, m_, rows, k_, n, k_, out, n);
  std::fill_n(out, lanes() * n, 0.0f);
  kernels_.matmul_panels(rows, n, k_, memory_.get(), groups(), out);
}

}  // namespace mythos
