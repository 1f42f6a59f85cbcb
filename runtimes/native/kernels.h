// The arithmetic of the operators, once per instruction set and once in plain C++: plain functions over rows of numbers, no onnxruntime, no allocation.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mythos {

// What one row of queries may see and has gathered so far, for online softmax (arXiv 1805.02867).
struct SoftmaxRow {
  float max;
  float sum;
};

// How the numbers of a cache are stored.
enum class CacheType { kFloat32, kFloat16, kBFloat16, kInt8 };
constexpr size_t SizeOf(CacheType type) { return type == CacheType::kFloat32 ? 4 : type == CacheType::kInt8 ? 1 : 2; }

// Many tokens are taken sixteen at a time, one a vector lane: matrices are read as they lie, element by element, against
// panels of tokens, and no sum runs across lanes.
constexpr size_t kPanel = 16;

// Rows of weights as they are stored: integers along the input channels, a scale for every block of them. int4: two
// numbers a byte, the first in the low half, in two's complement (the layout of an ONNX INT4 tensor).
struct QuantizedRows {
  const uint8_t* values;
  const void* scales;  // [rows][ceil(k / block)], float16 or float32
  size_t k, block;     // block: 32, 64 or 128
  int bits;            // 8 or 4
  bool half_scales;
  size_t blocks() const { return (k + block - 1) / block; }
  size_t row_bytes() const { return k * static_cast<size_t>(bits) / 8; }
  const uint8_t* row(size_t r) const { return values + r * row_bytes(); }
  const void* row_scales(size_t r) const {
    return static_cast<const char*>(scales) + r * blocks() * (half_scales ? sizeof(uint16_t) : sizeof(float));
  }
};

// Tokens quantized block by block, in the order in which the kernels of the same table read them.
// In rows, for int4 weights: channels 0, 2, 4 … then 1, 3, 5 …. In panels: four or eight channels (see panel_channels) of each of
// sixteen tokens at a time (for int4: of every eight channels the even four, then the odd four).
// Where weights are read as unsigned bytes, `offsets` hold what that adds to the sums, negated.
struct QuantizedTokens {
  int8_t* values;
  float* scales;     // rows: [m][padded blocks]; panels: [panel][block][kPanel]
  int32_t* offsets;  // rows: [m][padded k / (4 or 8)]; panels: [panel][block][kPanel]
  size_t k, block;
  int bits;          // of the weights
  // Every token's row is padded with zeros to whole vectors of the widest instruction set.
  size_t padded_k() const { return (k + 127) / 128 * 128; }
  size_t blocks() const { return (k + block - 1) / block; }
  size_t padded_blocks() const { return (blocks() + 15) / 16 * 16; }
  size_t padded_offsets() const { return padded_k() / (bits == 4 ? 8 : 4); }
};

// Products with cached rows of one type as they are stored: with 16-bit numbers, to which queries and weights of rows are rounded
// first, padded with zeros to whole vectors of the widest instruction set.
constexpr size_t PaddedToNarrow(size_t n) { return (n + 31) / 32 * 32; }
struct NarrowKernels {
  size_t parts;   // 16-bit numbers whose sum stands for one number of a query
  size_t most_k;  // longest dot product that cannot overflow a sum
  // out [parts][padded n] = x[n] rounded. Returns what the rounded numbers are to be multiplied with.
  float (*round_query)(const float* x, size_t n, void* out);
  // out [padded n] = x[n] * scales[n] (null for no scales) rounded. Returns the same.
  float (*round_weights)(const float* x, const float* scales, size_t n, void* out);
  // y[m][n] = factors[m] * scales[n] (null for neither) * sum over k of x[m][k] * w[n][k], for queries x [m][parts][padded k].
  void (*matmul_nt)(const void* x, const float* factors, size_t m, const void* w, const float* scales, size_t ldw, size_t n,
                    size_t k, float* y, size_t ldy);
  // y[m][n] += factors[m] * sum over k of x[m][k] * w[k][n], for weights x. Where k is odd, x[m][k] is 0.
  void (*matmul_nn)(const void* x, size_t ldx, const float* factors, size_t m, const void* w, size_t ldw, size_t k, size_t n,
                    float* y, size_t ldy);
};

struct Kernels {
  const char* name;
  // y[m][n] = sum over k of x[m][k] * w[n][k]. Rows of x, w, y lie ldx, ldw, ldy floats apart.
  void (*matmul_nt)(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t n, size_t k, float* y,
                    size_t ldy);
  // y[m][n] += sum over k of x[m][k] * w[k][n].
  void (*matmul_nn)(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t k, size_t n, float* y,
                    size_t ldy);
  // y[panel][rows][kPanel] += sum over k of a[rows][k] * b[panel][k][kPanel].
  void (*matmul_panels)(const float* a, size_t rows, size_t k, const float* b, size_t panels, float* y);
  // q[k] = round(x / scale), scale[b] = max |x| of block b / 127; nearest, ties to even. A NaN or infinity makes its block's scale so.
  void (*quantize)(const float* x, size_t k, size_t block, int8_t* q, float* scales);
  // q[k] = round(x / scale) within ±127, scales[b] = scale; nearest, ties to even. A NaN makes its block's scale so.
  void (*quantize_static)(const float* x, size_t k, size_t block, float scale, int8_t* q, float* scales);
  // From plain order into row `token` of `out` (see QuantizedTokens). q is zero up to padded_k.
  void (*pack_row)(const int8_t* q, const QuantizedTokens& out, size_t token);
  // y[m][n] = x · rows^T for m tokens in rows.
  void (*matmul_quantized)(const QuantizedTokens& x, size_t m, const QuantizedRows& w, size_t first, size_t n, float* y,
                           size_t ldy);
  // y[panel][n][kPanel] = the same for panels; row_scales: scratch of n * blocks floats.
  void (*matmul_quantized_panels)(const QuantizedTokens& x, size_t panels, const QuantizedRows& w, size_t first, size_t n,
                                  float* row_scales, float* y);
  size_t panel_channels;  // neighbouring channels of a token in a panel: 4, or 8 where processors multiply 2 x 8 with 8 x 2 numbers
  // Whether weights of so many bits are read as unsigned bytes, and offsets are wanted.
  bool (*biased)(int bits);
  // out[k] = the weights of one row, as floats.
  void (*dequantize)(const QuantizedRows& w, size_t row, float* out);
  // out[n] = scale * from[n], of any cache type but float32; scale is 1 for all but int8.
  void (*widen)(CacheType type, const void* from, size_t n, float scale, float* out);
  // What multiplies rows of that type as they are stored; null where they are to be widened first.
  const NarrowKernels* (*narrow)(CacheType type);
  // out[i] = silu(gate[i]) * up[i].
  void (*swiglu)(const float* gate, const float* up, size_t n, float* out);
  // Turns scores[n] into exp(score - new max) in place, updates the row, and returns exp(old max - new max).
  float (*online_softmax)(float* scores, size_t n, SoftmaxRow* row);
  // y[i] *= factor; y[i] += factor * x[i].
  void (*scale)(float* y, float factor, size_t n);
  void (*axpy)(float* y, const float* x, float factor, size_t n);
  // out = x / sqrt(mean(x²) + epsilon) * weight: RMSNorm (arXiv 1910.07467). out may be x.
  void (*rms_norm)(const float* x, const float* weight, size_t n, float epsilon, float* out);
};

// The table in use: at first the best this processor runs.
const Kernels& CurrentKernels();
// Changes it for the whole process, for tests; false where this processor lacks the instructions or none has that name.
bool UseKernels(const char* name);

}  // namespace mythos
