// The kernels in plain C++: for processors without a table of their own, and what the tests compare the others with.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace mythos {
namespace {

void MatMulNT(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t n, size_t k, float* y, size_t ldy) {
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (size_t at = 0; at < k; ++at) sum += x[i * ldx + at] * w[j * ldw + at];
      y[i * ldy + j] = sum;
    }
}

void MatMulNN(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t k, size_t n, float* y, size_t ldy) {
  for (size_t i = 0; i < m; ++i)
    for (size_t at = 0; at < k; ++at)
      for (size_t j = 0; j < n; ++j) y[i * ldy + j] += x[i * ldx + at] * w[at * ldw + j];
}

void MatMulPanels(const float* a, size_t rows, size_t k, const float* b, size_t panels, float* y) {
  for (size_t panel = 0; panel < panels; ++panel, b += k * kPanel, y += rows * kPanel)
    for (size_t r = 0; r < rows; ++r)
      for (size_t at = 0; at < k; ++at)
        for (size_t lane = 0; lane < kPanel; ++lane) y[r * kPanel + lane] += a[r * k + at] * b[at * kPanel + lane];
}

// IEEE 754 binary16, as any processor can read it.
float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  if (exponent == 0) {
    const float subnormal = static_cast<float>(fraction) * 5.9604644775390625e-08f;
    std::memcpy(&bits, &subnormal, sizeof bits);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float ScaleOf(const QuantizedRows& w, size_t row, size_t block) {
  if (!w.half_scales) return static_cast<const float*>(w.row_scales(row))[block];
  return HalfToFloat(static_cast<const uint16_t*>(w.row_scales(row))[block]);
}

int WeightOf(const QuantizedRows& w, size_t row, size_t at) {
  const uint8_t* from = w.row(row);
  if (w.bits == 8) return static_cast<int8_t>(from[at]);
  return ((from[at / 2] >> (at % 2 * 4) & 15) ^ 8) - 8;
}

void Quantize(const float* x, size_t k, size_t block, int8_t* q, float* scales) {
  for (size_t b = 0; b * block < k; ++b) {
    const size_t end = std::min(k, (b + 1) * block);
    float largest = 0.0f;
    for (size_t i = b * block; i < end; ++i)
      if (!std::isnan(largest) && !(std::abs(x[i]) <= largest)) largest = std::abs(x[i]);
    scales[b] = largest / 127.0f;
    const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    for (size_t i = b * block; i < end; ++i) {
      const float rounded = std::nearbyint(x[i] * inverse);
      q[i] = std::isfinite(rounded) ? static_cast<int8_t>(rounded) : int8_t{1};
    }
  }
}

void QuantizeStatic(const float* x, size_t k, size_t block, float scale, int8_t* q, float* scales) {
  for (size_t b = 0; b * block < k; ++b) {
    scales[b] = scale;
    for (size_t i = b * block; i < std::min(k, (b + 1) * block); ++i) {
      if (std::isnan(x[i])) scales[b] = x[i];
      q[i] = static_cast<int8_t>(std::nearbyint(std::min(127.0f, std::max(-127.0f, x[i] / scale))));
    }
  }
}

void PackRow(const int8_t* q, const QuantizedTokens& out, size_t token) {
  int8_t* values = out.values + token * out.padded_k();
  const size_t half = out.padded_k() / 2;
  for (size_t i = 0; i < out.padded_k(); ++i) values[out.bits == 8 ? i : i % 2 * half + i / 2] = q[i];
}

void MatMulQuantized(const QuantizedTokens& x, size_t m, const QuantizedRows& w, size_t first, size_t n, float* y, size_t ldy) {
  const size_t half = x.padded_k() / 2;
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < n; ++j) {
      const int8_t* values = x.values + i * x.padded_k();
      float total = 0.0f;
      for (size_t b = 0; b < w.blocks(); ++b) {
        int32_t sum = 0;
        for (size_t at = b * w.block; at < std::min(w.k, (b + 1) * w.block); ++at)
          sum += WeightOf(w, first + j, at) * values[w.bits == 8 ? at : at % 2 * half + at / 2];
        total += static_cast<float>(sum) * ScaleOf(w, first + j, b) * x.scales[i * x.padded_blocks() + b];
      }
      y[i * ldy + j] = total;
    }
}

void MatMulQuantizedPanels(const QuantizedTokens& x, size_t panels, const QuantizedRows& w, size_t first, size_t n, float*, float* y) {
  for (size_t lane = 0; lane < panels * kPanel; ++lane)
    for (size_t j = 0; j < n; ++j) {
      const size_t panel = lane / kPanel, column = lane % kPanel;
      float total = 0.0f;
      for (size_t b = 0; b < w.blocks(); ++b) {
        int32_t sum = 0;
        for (size_t at = b * w.block; at < std::min(w.k, (b + 1) * w.block); ++at) {
          const size_t quad = w.bits == 8 ? at / 4 : at / 8 * 2 + at % 2, part = w.bits == 8 ? at % 4 : at % 8 / 2;
          sum += WeightOf(w, first + j, at) * x.values[panel * x.padded_k() * kPanel + (quad * kPanel + column) * 4 + part];
        }
        total += static_cast<float>(sum) * ScaleOf(w, first + j, b) * x.scales[(panel * w.blocks() + b) * kPanel + column];
      }
      y[(panel * n + j) * kPanel + column] = total;
    }
}

bool Biased(int) { return false; }

void Dequantize(const QuantizedRows& w, size_t row, float* out) {
  for (size_t b = 0; b < w.blocks(); ++b) {
    const float scale = ScaleOf(w, row, b);
    for (size_t i = b * w.block; i < std::min(w.k, (b + 1) * w.block); ++i) out[i] = scale * static_cast<float>(WeightOf(w, row, i));
  }
}

void Widen(CacheType type, const void* from, size_t n, float scale, float* out) {
  for (size_t i = 0; i < n; ++i) {
    if (type == CacheType::kFloat16) {
      out[i] = HalfToFloat(static_cast<const uint16_t*>(from)[i]);
    } else if (type == CacheType::kBFloat16) {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << 16;
      std::memcpy(out + i, &bits, sizeof bits);
    } else {
      out[i] = scale * static_cast<float>(static_cast<const int8_t*>(from)[i]);
    }
  }
}

const NarrowKernels* Narrow(CacheType) { return nullptr; }

void Swiglu(const float* gate, const float* up, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

float OnlineSoftmax(float* scores, size_t n, SoftmaxRow* row) {
  const float top = std::max(row->max, *std::max_element(scores, scores + n));
  const float correction = std::exp(row->max - top);
  row->sum *= correction;
  for (size_t i = 0; i < n; ++i) row->sum += scores[i] = std::exp(scores[i] - top);
  row->max = top;
  return correction;
}

void Scale(float* y, float factor, size_t n) {
  for (size_t i = 0; i < n; ++i) y[i] *= factor;
}

void Axpy(float* y, const float* x, float factor, size_t n) {
  for (size_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

void RmsNorm(const float* x, const float* weight, size_t n, float epsilon, float* out) {
  float sum = 0.0f;
  for (size_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(n) + epsilon);
  for (size_t i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

}  // namespace

extern const Kernels scalar;
const Kernels scalar = {
    "scalar", MatMulNT,   MatMulNN, MatMulPanels, Quantize, QuantizeStatic, PackRow, MatMulQuantized, MatMulQuantizedPanels, 4,
    Biased,   Dequantize, Widen,    Narrow,      Swiglu,   OnlineSoftmax,  Scale,   Axpy,            RmsNorm,
};

}  // namespace mythos
