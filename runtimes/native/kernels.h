// The arithmetic of the operators, once per instruction set: plain functions over float rows, no onnxruntime, no allocation.
#pragma once
#include <cstddef>

namespace mythos {

// What one row of queries may see and has gathered so far, for online softmax (arXiv 1805.02867).
struct SoftmaxRow {
  float max;
  float sum;
};

// Experts with many tokens take them sixteen at a time, one a vector lane: their matrices are read as they lie, element by
// element, against panels [k][kPanel] of tokens, and no sum runs across lanes.
constexpr size_t kPanel = 16;

struct Kernels {
  const char* name;
  // y[m][n] = sum over k of x[m][k] * w[n][k]. Rows of x, w, y lie ldx, ldw, ldy floats apart.
  void (*matmul_nt)(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t n, size_t k, float* y,
                    size_t ldy);
  // y[m][n] += sum over k of x[m][k] * w[k][n].
  void (*matmul_nn)(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t k, size_t n, float* y,
                    size_t ldy);
  // out[i] = silu(gate[i]) * up[i].
  void (*swiglu)(const float* gate, const float* up, size_t n, float* out);
  // Turns scores[n] into exp(score - new max) in place, updates the row, and returns exp(old max - new max).
  float (*online_softmax)(float* scores, size_t n, SoftmaxRow* row);
  // y[i] *= factor; y[i] += factor * x[i].
  void (*scale)(float* y, float factor, size_t n);
  void (*axpy)(float* y, const float* x, float factor, size_t n);
  float (*sum_of_squares)(const float* x, size_t n);
  // y[r][lane] += sum over k of a[r * row_stride + k * k_stride] * b[k][lane], for panels b and y.
  void (*matmul_panel)(const float* a, size_t row_stride, size_t k_stride, size_t rows, size_t k, const float* b, float* y);
};

// The table in use: at first the best this processor runs.
const Kernels& CurrentKernels();
// Changes it for the whole process, for tests; false where this processor lacks the instructions or none has that name.
bool UseKernels(const char* name);

}  // namespace mythos
