// Products of many tokens, in panels, with block-quantized weights: part of kernels.cc, compiled once per instruction set.

#if MYTHOS_VNNI
// Sums of products in a type that says that they are 32-bit integers: of __m512i, gcc copies each before and after every product.
typedef int32_t Sums __attribute__((vector_size(4 * kLanes)));
HWY_INLINE VI32 Unwrap(Sums sums) { return VI32{reinterpret_cast<__m512i>(sums)}; }
HWY_INLINE Sums Wrap(VI32 sums) { return reinterpret_cast<Sums>(sums.raw); }
#else
using Sums = VI32;
HWY_INLINE VI32 Unwrap(VI32 sums) { return sums; }
HWY_INLINE VI32 Wrap(VI32 sums) { return sums; }
#endif

// Four weight bytes of one row for all lanes; past the row's end they are 0.
HWY_INLINE VU8 BroadcastBytes(const uint8_t* from, size_t count) {
  uint32_t word = 0;
  if (HWY_LIKELY(count >= 4)) {
    hwy::CopyBytes<4>(from, &word);
  } else {
    for (size_t i = 0; i < count; ++i) word |= static_cast<uint32_t>(from[i]) << (8 * i);
  }
  return hn::BitCast(du8, hn::Set(du32, word));
}

constexpr size_t kVectorsAPanel = kPanel / kLanes;

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr size_t kPanelChannels = 8;

// Eight channels of each of two rows; past `count` bytes they are 0.
template <int kBits>
HWY_INLINE int8x16_t TwoRows(const uint8_t* a, const uint8_t* b, size_t count) {
  constexpr size_t kBytes = kBits;
  uint8_t padded[2][kBytes];
  if (HWY_UNLIKELY(count < kBytes)) {
    hwy::ZeroBytes<sizeof padded>(padded);
    for (size_t i = 0; i < count; ++i) padded[0][i] = a[i], padded[1][i] = b[i];
    a = padded[0], b = padded[1];
  }
  if constexpr (kBits == 8) {
    return vreinterpretq_s8_u8(vcombine_u8(vld1_u8(a), vld1_u8(b)));
  } else {
    uint32_t words[2];
    hwy::CopyBytes<4>(a, words);
    hwy::CopyBytes<4>(b, words + 1);
    const int8x8_t both = vreinterpret_s8_u32(vld1_u32(words));
    const int8x8_t even = vshr_n_s8(vshl_n_s8(both, 4), 4), odd = vshr_n_s8(both, 4);
    return vreinterpretq_s8_s32(vcombine_s32(vzip1_s32(vreinterpret_s32_s8(even), vreinterpret_s32_s8(odd)),
                                             vzip2_s32(vreinterpret_s32_s8(even), vreinterpret_s32_s8(odd))));
  }
}

// The sums of one block of channels, bytes [at, end) of rows from `row` on: products of 2 x 8 with 8 x 2 numbers.
template <int kBits, size_t R, size_t T>
HWY_INLINE void BlockSums(const int8_t* const (&values)[T], const QuantizedRows& w, size_t row, size_t at, size_t end,
                          Sums (&sum)[R][T]) {
  constexpr size_t kPairs = (R + 1) / 2;
  int32x4_t squares[kPairs][2 * T];
  for (size_t p = 0; p < kPairs; ++p)
    for (size_t t = 0; t < 2 * T; ++t) squares[p][t] = vdupq_n_s32(0);
  for (; at < end; at += kBits) {
    int8x16_t rows[kPairs];
    for (size_t p = 0; p < kPairs; ++p)
      rows[p] = TwoRows<kBits>(w.row(row + 2 * p) + at, w.row(row + HWY_MIN(2 * p + 1, R - 1)) + at, end - at);
    for (size_t t = 0; t < 2 * T; ++t) {
      const int8x16_t tokens = vld1q_s8(values[t / 2] + at / kBits * kPanel * 8 + t % 2 * 16);
      for (size_t p = 0; p < kPairs; ++p) squares[p][t] = vmmlaq_s32(squares[p][t], rows[p], tokens);
    }
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t t = 0; t < T; ++t) {
      const int64x2_t first = vreinterpretq_s64_s32(squares[r / 2][2 * t]);
      const int64x2_t second = vreinterpretq_s64_s32(squares[r / 2][2 * t + 1]);
      sum[r][t] = VI32(vreinterpretq_s32_s64(r % 2 == 0 ? vzip1q_s64(first, second) : vzip2q_s64(first, second)));
    }
}
#else
constexpr size_t kPanelChannels = 4;

// The sums of one block of channels, bytes [at, end) of rows from `row` on: on top of what sum holds.
template <int kBits, size_t R, size_t T>
HWY_INLINE void BlockSums(const int8_t* const (&values)[T], const QuantizedRows& w, size_t row, size_t at, size_t end,
                          Sums (&sum)[R][T]) {
  for (; at < end; at += 4) {
    VU8 first[R], second[R];
    for (size_t r = 0; r < R; ++r) Unpack<kBits>(BroadcastBytes(w.row(row + r) + at, end - at), first[r], second[r]);
    const size_t quad = at / 4 * (kBits == 4 ? 2 : 1) * 4 * kPanel;
    for (size_t t = 0; t < T; ++t) {
      const VI8 xs = hn::LoadU(di8, values[t] + quad);
      for (size_t r = 0; r < R; ++r) sum[r][t] = Wrap(Dot<kBits>(Unwrap(sum[r][t]), first[r], xs));
      if constexpr (kBits == 4) {
        const VI8 odd = hn::LoadU(di8, values[t] + quad + 4 * kPanel);
        for (size_t r = 0; r < R; ++r) sum[r][t] = Wrap(Dot<kBits>(Unwrap(sum[r][t]), second[r], odd));
      }
    }
  }
}
#endif

// R rows by T vectors of tokens, `vector` the first of them; row_scales [R][blocks].
template <int kBits, size_t R, size_t T>
HWY_INLINE void PanelTile(const QuantizedTokens& x, size_t vector, const QuantizedRows& w, size_t row, const float* row_scales,
                          size_t n, size_t out_row, float* HWY_RESTRICT y) {
  const size_t blocks = w.blocks(), bytes = w.row_bytes(), block_bytes = w.block * kBits / 8;
  const size_t panel_values = x.padded_k() * kPanel;
  const int8_t* values[T];
  size_t aside[T];  // of scales and offsets: [panel][block][kPanel]
  V acc[R][T];
  for (size_t t = 0; t < T; ++t) {
    const size_t panel = (vector + t) / kVectorsAPanel, lane = (vector + t) % kVectorsAPanel * kLanes;
    values[t] = x.values + panel * panel_values + kPanelChannels * lane;
    aside[t] = panel * blocks * kPanel + lane;
    for (size_t r = 0; r < R; ++r) acc[r][t] = hn::Zero(d);
  }
  for (size_t b = 0; b < blocks; ++b) {
    Sums sum[R][T];
    for (size_t t = 0; t < T; ++t) {
      const Sums start = Wrap(Biased(kBits) ? hn::LoadU(di32, x.offsets + aside[t] + b * kPanel) : hn::Zero(di32));
      for (size_t r = 0; r < R; ++r) sum[r][t] = start;
    }
    BlockSums<kBits>(values, w, row, b * block_bytes, HWY_MIN(bytes, (b + 1) * block_bytes), sum);
    for (size_t t = 0; t < T; ++t) {
      const V of_tokens = hn::LoadU(d, x.scales + aside[t] + b * kPanel);
      for (size_t r = 0; r < R; ++r)
        acc[r][t] = hn::MulAdd(hn::ConvertTo(d, Unwrap(sum[r][t])), hn::Mul(of_tokens, hn::Set(d, row_scales[r * blocks + b])),
                               acc[r][t]);
    }
  }
  for (size_t t = 0; t < T; ++t) {
    const size_t panel = (vector + t) / kVectorsAPanel, lane = (vector + t) % kVectorsAPanel * kLanes;
    for (size_t r = 0; r < R; ++r) hn::StoreU(acc[r][t], d, y + (panel * n + out_row + r) * kPanel + lane);
  }
}

template <int kBits, size_t T>
HWY_INLINE void PanelTiles(const QuantizedTokens& x, size_t vector, const QuantizedRows& w, size_t first, const float* row_scales,
                           size_t n, float* y) {
  constexpr size_t kRows = HWY_TARGET == HWY_AVX2 ? 1 : kPanelChannels == 8 ? 4 : 2;
  const size_t blocks = w.blocks();
  size_t r = 0;
  for (; r + kRows <= n; r += kRows)
    PanelTile<kBits, kRows, T>(x, vector, w, first + r, row_scales + r * blocks, n, r, y);
  for (; r < n; ++r) PanelTile<kBits, 1, T>(x, vector, w, first + r, row_scales + r * blocks, n, r, y);
}

template <int kBits>
void MatMulQuantizedPanelsOf(const QuantizedTokens& x, size_t panels, const QuantizedRows& w, size_t first, size_t n,
                             const float* row_scales, float* y) {
  const size_t vectors = panels * kVectorsAPanel;
  size_t v = 0;
  for (; v + 4 <= vectors; v += 4) PanelTiles<kBits, 4>(x, v, w, first, row_scales, n, y);
  for (; v + 2 <= vectors; v += 2) PanelTiles<kBits, 2>(x, v, w, first, row_scales, n, y);
  for (; v < vectors; ++v) PanelTiles<kBits, 1>(x, v, w, first, row_scales, n, y);
}

void MatMulQuantizedPanels(const QuantizedTokens& x, size_t panels, const QuantizedRows& w, size_t first, size_t n,
                           float* row_scales, float* y) {
  const size_t blocks = w.blocks();
  for (size_t r = 0; r < n; ++r)
    for (size_t b = 0; b < blocks; b += kLanes) {
      const V scales = LoadScales(w.row_scales(first + r), w.half_scales, b, blocks - b);
      if (b + kLanes <= blocks) {
        hn::StoreU(scales, d, row_scales + r * blocks + b);
      } else {
        hn::StoreN(scales, d, row_scales + r * blocks + b, blocks - b);
      }
    }
  (w.bits == 4 ? MatMulQuantizedPanelsOf<4> : MatMulQuantizedPanelsOf<8>)(x, panels, w, first, n, row_scales, y);
}
