// Compiled once per instruction set (see CMakeLists.txt); MYTHOS_KERNELS names the table. No std templates here: an inline
// function compiled for a newer processor must never be the copy that the linker keeps for all.
#include "kernels.h"

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"

// Highway silently takes the best target that all compiler flags allow; a table must be what its name says.
#define MYTHOS_TARGET_avx512_bf16 HWY_AVX3_ZEN4
#define MYTHOS_TARGET_avx512_vnni HWY_AVX3_DL
#define MYTHOS_TARGET_avx512 HWY_AVX3
#define MYTHOS_TARGET_avx2 HWY_AVX2
#define MYTHOS_TARGET_neon_i8mm HWY_NEON_WITHOUT_AES
#define MYTHOS_TARGET_neon_dotprod HWY_NEON_WITHOUT_AES
#define MYTHOS_TARGET_neon HWY_NEON_WITHOUT_AES
#define MYTHOS_TARGET_OF_(name) MYTHOS_TARGET_##name
#define MYTHOS_TARGET_OF(name) MYTHOS_TARGET_OF_(name)
static_assert(HWY_TARGET == MYTHOS_TARGET_OF(MYTHOS_KERNELS), "the compiler flags do not give the instruction set asked for");

HWY_BEFORE_NAMESPACE();
namespace mythos {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

constexpr D d;
constexpr size_t kLanes = hn::MaxLanes(d);
// Tiles that keep accumulators and operands in registers: 32 of them with AVX-512 and NEON, 16 with AVX2.
constexpr size_t kTileM = HWY_TARGET == HWY_AVX2 ? 2 : 4;
constexpr size_t kTileN = 4;

// The sums of four vectors' lanes, side by side: three shuffled additions instead of four full reductions.
HWY_INLINE void StoreSums(V a, V b, V c, V e, float* HWY_RESTRICT y) {
  const hn::Repartition<double, D> wide;
  const V ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const V ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto ab2 = hn::BitCast(wide, ab), ce2 = hn::BitCast(wide, ce);
  const V all = hn::Add(hn::BitCast(d, hn::InterleaveLower(wide, ab2, ce2)), hn::BitCast(d, hn::InterleaveUpper(wide, ab2, ce2)));
  HWY_ALIGN float blocks[kLanes];
  hn::Store(all, d, blocks);
  const hn::FixedTag<float, 4> four;
  auto sum = hn::Load(four, blocks);
  for (size_t at = 4; at < kLanes; at += 4) sum = hn::Add(sum, hn::Load(four, blocks + at));
  hn::StoreU(sum, four, y);
}

// M x N dot products of length k, whole tiles only.
template <size_t M, size_t N>
HWY_INLINE void DotTile(const float* HWY_RESTRICT x, size_t ldx, const float* HWY_RESTRICT w, size_t ldw, size_t k,
                        float* HWY_RESTRICT y, size_t ldy) {
  V acc[M][N];
  for (size_t i = 0; i < M; ++i)
    for (size_t j = 0; j < N; ++j) acc[i][j] = hn::Zero(d);
  size_t at = 0;
  for (; at + kLanes <= k; at += kLanes) {
    V xs[M];
    for (size_t i = 0; i < M; ++i) xs[i] = hn::LoadU(d, x + i * ldx + at);
    for (size_t j = 0; j < N; ++j) {
      const V ws = hn::LoadU(d, w + j * ldw + at);
      for (size_t i = 0; i < M; ++i) acc[i][j] = hn::MulAdd(xs[i], ws, acc[i][j]);
    }
  }
  if (at < k) {
    V xs[M];
    for (size_t i = 0; i < M; ++i) xs[i] = hn::LoadN(d, x + i * ldx + at, k - at);
    for (size_t j = 0; j < N; ++j) {
      const V ws = hn::LoadN(d, w + j * ldw + at, k - at);
      for (size_t i = 0; i < M; ++i) acc[i][j] = hn::MulAdd(xs[i], ws, acc[i][j]);
    }
  }
  for (size_t i = 0; i < M; ++i) {
    if constexpr (N == 4) {
      StoreSums(acc[i][0], acc[i][1], acc[i][2], acc[i][3], y + i * ldy);
    } else {
      for (size_t j = 0; j < N; ++j) y[i * ldy + j] = hn::ReduceSum(d, acc[i][j]);
    }
  }
}

template <size_t M>
HWY_INLINE void DotRows(const float* x, size_t ldx, const float* w, size_t ldw, size_t n, size_t k, float* y,
                        size_t ldy) {
  size_t j = 0;
  for (; j + kTileN <= n; j += kTileN) DotTile<M, kTileN>(x, ldx, w + j * ldw, ldw, k, y + j, ldy);
  for (; j < n; ++j) DotTile<M, 1>(x, ldx, w + j * ldw, ldw, k, y + j, ldy);
}

void MatMulNT(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t n, size_t k, float* y,
              size_t ldy) {
  // Rows of w in blocks that stay in the second-level cache while all tokens pass over them.
  constexpr size_t kBlock = 64;
  for (size_t j = 0; j < n; j += kBlock) {
    const size_t nj = n - j < kBlock ? n - j : kBlock;
    size_t i = 0;
    for (; i + kTileM <= m; i += kTileM) DotRows<kTileM>(x + i * ldx, ldx, w + j * ldw, ldw, nj, k, y + i * ldy + j, ldy);
    for (; i + 2 <= m; i += 2) DotRows<2>(x + i * ldx, ldx, w + j * ldw, ldw, nj, k, y + i * ldy + j, ldy);
    for (; i < m; ++i) DotRows<1>(x + i * ldx, ldx, w + j * ldw, ldw, nj, k, y + i * ldy + j, ldy);
  }
}

// M rows of y, N vectors wide; the last vector may be cut to `lanes`.
template <size_t M, size_t N>
HWY_INLINE void AccumulateTile(const float* HWY_RESTRICT x, size_t ldx, const float* HWY_RESTRICT w, size_t ldw, size_t k,
                               size_t lanes, float* HWY_RESTRICT y, size_t ldy) {
  V acc[M][N];
  const bool whole = lanes == kLanes;
  for (size_t i = 0; i < M; ++i)
    for (size_t j = 0; j < N; ++j)
      acc[i][j] = whole ? hn::LoadU(d, y + i * ldy + j * kLanes) : hn::LoadN(d, y + i * ldy, lanes);
  for (size_t at = 0; at < k; ++at) {
    V ws[N];
    for (size_t j = 0; j < N; ++j)
      ws[j] = whole ? hn::LoadU(d, w + at * ldw + j * kLanes) : hn::LoadN(d, w + at * ldw, lanes);
    for (size_t i = 0; i < M; ++i) {
      const V xs = hn::Set(d, x[i * ldx + at]);
      for (size_t j = 0; j < N; ++j) acc[i][j] = hn::MulAdd(xs, ws[j], acc[i][j]);
    }
  }
  for (size_t i = 0; i < M; ++i)
    for (size_t j = 0; j < N; ++j) {
      if (whole) {
        hn::StoreU(acc[i][j], d, y + i * ldy + j * kLanes);
      } else {
        hn::StoreN(acc[i][j], d, y + i * ldy, lanes);
      }
    }
}

template <size_t N>
HWY_INLINE void AccumulateRows(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t k, size_t lanes,
                               float* y, size_t ldy) {
  constexpr size_t kRows = 2 * kTileM;
  size_t i = 0;
  if constexpr (kRows * N <= 16)
    for (; i + kRows <= m; i += kRows) AccumulateTile<kRows, N>(x + i * ldx, ldx, w, ldw, k, lanes, y + i * ldy, ldy);
  for (; i + kTileM <= m; i += kTileM) AccumulateTile<kTileM, N>(x + i * ldx, ldx, w, ldw, k, lanes, y + i * ldy, ldy);
  for (; i + 2 <= m; i += 2) AccumulateTile<2, N>(x + i * ldx, ldx, w, ldw, k, lanes, y + i * ldy, ldy);
  for (; i < m; ++i) AccumulateTile<1, N>(x + i * ldx, ldx, w, ldw, k, lanes, y + i * ldy, ldy);
}

void MatMulNN(const float* x, size_t ldx, size_t m, const float* w, size_t ldw, size_t k, size_t n, float* y,
              size_t ldy) {
  size_t j = 0;
  if (m < 2 * kTileM)  // few rows: wider, so that as many sums run at a time
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) AccumulateRows<4>(x, ldx, m, w + j, ldw, k, kLanes, y + j, ldy);
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) AccumulateRows<2>(x, ldx, m, w + j, ldw, k, kLanes, y + j, ldy);
  for (; j < n; j += kLanes) AccumulateRows<1>(x, ldx, m, w + j, ldw, k, n - j < kLanes ? n - j : kLanes, y + j, ldy);
}

HWY_INLINE V Swiglu(V gate, V up) {
  const V one = hn::Set(d, 1.0f);
  return hn::Mul(hn::Div(gate, hn::Add(one, hn::Exp(d, hn::Neg(gate)))), up);
}

void SwigluRow(const float* gate, const float* up, size_t n, float* out) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(Swiglu(hn::LoadU(d, gate + i), hn::LoadU(d, up + i)), d, out + i);
  if (i < n) hn::StoreN(Swiglu(hn::LoadN(d, gate + i, n - i), hn::LoadN(d, up + i, n - i)), d, out + i, n - i);
}

float OnlineSoftmax(float* scores, size_t n, SoftmaxRow* row) {
  const V lowest = hn::Set(d, -3.0e38f);
  V largest = lowest;
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = hn::Max(largest, hn::LoadU(d, scores + i));
  if (i < n) largest = hn::Max(largest, hn::LoadNOr(lowest, d, scores + i, n - i));
  float top = hn::ReduceMax(d, largest);
  if (top < row->max) top = row->max;
  const V shift = hn::Set(d, top);
  V total = hn::Zero(d);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const V p = hn::Exp(d, hn::Sub(hn::LoadU(d, scores + i), shift));
    hn::StoreU(p, d, scores + i);
    total = hn::Add(total, p);
  }
  float sum = hn::ReduceSum(d, total);
  for (; i < n; ++i) {
    scores[i] = hn::GetLane(hn::Exp(d, hn::Set(d, scores[i] - top)));
    sum += scores[i];
  }
  const float correction = hn::GetLane(hn::Exp(d, hn::Set(d, row->max - top)));
  row->sum = row->sum * correction + sum;
  row->max = top;
  return correction;
}

void Scale(float* y, float factor, size_t n) {
  const V f = hn::Set(d, factor);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, y + i), f), d, y + i);
  for (; i < n; ++i) y[i] *= factor;
}

void Axpy(float* y, const float* x, float factor, size_t n) {
  const V f = hn::Set(d, factor);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::MulAdd(hn::LoadU(d, x + i), f, hn::LoadU(d, y + i)), d, y + i);
  for (; i < n; ++i) y[i] += factor * x[i];
}

void RmsNorm(const float* x, const float* weight, size_t n, float epsilon, float* out) {
  V total = hn::Zero(d);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const V v = hn::LoadU(d, x + i);
    total = hn::MulAdd(v, v, total);
  }
  float sum = hn::ReduceSum(d, total);
  for (; i < n; ++i) sum += x[i] * x[i];
  const float mean = sum / static_cast<float>(n) + epsilon;
  const float inverse = 1.0f / hn::GetLane(hn::Sqrt(hn::Set(d, mean)));
  const V factor = hn::Set(d, inverse);
  for (i = 0; i + kLanes <= n; i += kLanes)
    hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), factor), hn::LoadU(d, weight + i)), d, out + i);
  for (; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

template <typename T, typename Load>
HWY_INLINE void WidenOf(const T* from, size_t n, float* out, const Load& load) {
  const hn::Rebind<T, D> narrow;
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(load(hn::LoadU(narrow, from + i)), d, out + i);
  if (i < n) hn::StoreN(load(hn::LoadN(narrow, from + i, n - i)), d, out + i, n - i);
}

void Widen(CacheType type, const void* from, size_t n, float scale, float* out) {
  if (type == CacheType::kFloat16) {
    WidenOf(static_cast<const hwy::float16_t*>(from), n, out, [](auto v) HWY_ATTR { return hn::PromoteTo(d, v); });
  } else if (type == CacheType::kBFloat16) {
    WidenOf(static_cast<const hwy::bfloat16_t*>(from), n, out, [](auto v) HWY_ATTR { return hn::PromoteTo(d, v); });
  } else {
    const V factor = hn::Set(d, scale);
    WidenOf(static_cast<const int8_t*>(from), n, out, [factor](auto v) HWY_ATTR {
      return hn::Mul(factor, hn::ConvertTo(d, hn::PromoteTo(hn::RebindToSigned<D>(), v)));
    });
  }
}

constexpr size_t kVectors = kPanel / kLanes;  // a panel row

// Channels [first, first + n) of R rows of a [R][k] with P panels, b [P][k][kPanel], on top of y [P][y_stride].
template <size_t R, size_t P>
HWY_INLINE void PanelBlock(const float* HWY_RESTRICT a, size_t k, size_t first, size_t n, const float* HWY_RESTRICT b,
                           float* HWY_RESTRICT y, size_t y_stride) {
  constexpr size_t kWide = P * kVectors;
  const auto y_at = [&](size_t r, size_t v) { return y + v / kVectors * y_stride + r * kPanel + v % kVectors * kLanes; };
  V acc[R][kWide];
  for (size_t r = 0; r < R; ++r)
    for (size_t v = 0; v < kWide; ++v) acc[r][v] = hn::LoadU(d, y_at(r, v));
  for (size_t at = first; at < first + n; ++at) {
    V bs[kWide];
    for (size_t v = 0; v < kWide; ++v) bs[v] = hn::LoadU(d, b + (v / kVectors * k + at) * kPanel + v % kVectors * kLanes);
    for (size_t r = 0; r < R; ++r) {
      const V as = hn::Set(d, a[r * k + at]);
      for (size_t v = 0; v < kWide; ++v) acc[r][v] = hn::MulAdd(as, bs[v], acc[r][v]);
    }
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t v = 0; v < kWide; ++v) hn::StoreU(acc[r][v], d, y_at(r, v));
}

// The same of all rows, R at a time.
template <size_t R, size_t P>
HWY_INLINE void PanelRows(const float* a, size_t rows, size_t k, size_t first, size_t n, const float* b, float* y) {
  size_t r = 0;
  for (; r + R <= rows; r += R) PanelBlock<R, P>(a + r * k, k, first, n, b, y + r * kPanel, rows * kPanel);
  for (; r + 4 <= rows; r += 4) PanelBlock<4, P>(a + r * k, k, first, n, b, y + r * kPanel, rows * kPanel);
  for (; r < rows; ++r) PanelBlock<1, P>(a + r * k, k, first, n, b, y + r * kPanel, rows * kPanel);
}

// As many sums at once as registers hold: a number of a is loaded once for all panels of a block.
void MatMulPanels(const float* a, size_t rows, size_t k, const float* b, size_t panels, float* y) {
  constexpr size_t kRows = kVectors == 1 ? 12 : kVectors <= 4 ? 6 : 1;
  constexpr size_t kChannels = 512;  // of a block, so that it stays in the nearest cache
  for (size_t first = 0; first < k; first += kChannels) {
    const size_t n = HWY_MIN(kChannels, k - first);
    const float* from = b;
    float* to = y;
    for (size_t left = panels, taken; left > 0; left -= taken, from += taken * k * kPanel, to += taken * rows * kPanel) {
      if constexpr (kVectors == 1) {
        taken = left == 3 ? 3 : HWY_MIN(left, size_t{2});
        if (taken == 3) PanelRows<8, 3>(a, rows, k, first, n, from, to);
        if (taken == 2) PanelRows<kRows, 2>(a, rows, k, first, n, from, to);
      } else {
        taken = 1;
      }
      if (taken == 1) PanelRows<kRows, 1>(a, rows, k, first, n, from, to);
    }
  }
}

#include "kernels_quantized-inl.h"
#include "kernels_panels-inl.h"
#include "kernels_narrow-inl.h"

}  // namespace
}  // namespace HWY_NAMESPACE

#define MYTHOS_STRING_(name) #name
#define MYTHOS_STRING(name) MYTHOS_STRING_(name)
extern const Kernels MYTHOS_KERNELS;
const Kernels MYTHOS_KERNELS = {
    MYTHOS_STRING(MYTHOS_KERNELS),
    HWY_NAMESPACE::MatMulNT,
    HWY_NAMESPACE::MatMulNN,
    HWY_NAMESPACE::MatMulPanels,
    HWY_NAMESPACE::Quantize,
    HWY_NAMESPACE::QuantizeStatic,
    HWY_NAMESPACE::PackRow,
    HWY_NAMESPACE::MatMulQuantized,
    HWY_NAMESPACE::MatMulQuantizedPanels,
    HWY_NAMESPACE::kPanelChannels,
    HWY_NAMESPACE::IsBiased,
    HWY_NAMESPACE::Dequantize,
    HWY_NAMESPACE::Widen,
    HWY_NAMESPACE::Narrow,
    HWY_NAMESPACE::SwigluRow,
    HWY_NAMESPACE::OnlineSoftmax,
    HWY_NAMESPACE::Scale,
    HWY_NAMESPACE::Axpy,
    HWY_NAMESPACE::RmsNorm,
};

}  // namespace mythos
HWY_AFTER_NAMESPACE();
