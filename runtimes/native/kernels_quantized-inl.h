// Products of few tokens with block-quantized weights, and quantizing: part of kernels.cc, compiled once per instruction set.
// A chunk is one vector of weight bytes: 4 weights an int32 lane (int8) or 8 (int4). A group is the chunks that one vector of
// block scales serves. Every lane is scaled by its own block's scale, so blocks need not be as long as vectors.

using DI32 = hn::RebindToSigned<D>;
using DU32 = hn::RebindToUnsigned<D>;
using DI16 = hn::Repartition<int16_t, D>;
using DU16 = hn::Repartition<uint16_t, D>;
using DI8 = hn::Repartition<int8_t, D>;
using DU8 = hn::Repartition<uint8_t, D>;
using VI32 = hn::Vec<DI32>;
using VI8 = hn::Vec<DI8>;
using VU8 = hn::Vec<DU8>;
constexpr DI32 di32;
constexpr DU32 du32;
constexpr DI16 di16;
constexpr DU16 du16;
constexpr DI8 di8;
constexpr DU8 du8;

#if HWY_ARCH_X86
#define MYTHOS_X86 1
#else
#define MYTHOS_X86 0
#endif
#if MYTHOS_X86 && HWY_TARGET <= HWY_AVX3_DL
#define MYTHOS_VNNI 1
#else
#define MYTHOS_VNNI 0
#endif

// x86 multiplies unsigned with signed bytes; without VNNI only small unsigned ones cannot overflow 16 bits.
constexpr bool Biased(int bits) { return MYTHOS_VNNI || (MYTHOS_X86 && bits == 4); }
bool IsBiased(int bits) { return Biased(bits); }

// sum + the products of four neighbouring bytes, a lane. w: biased to unsigned where Biased says so.
template <int kBits>
HWY_INLINE VI32 Dot(VI32 sum, VU8 w, VI8 x) {
#if MYTHOS_VNNI
  return hn::SumOfMulQuadAccumulate(di32, w, x, sum);
#elif MYTHOS_X86
  if constexpr (kBits == 4) {
    return hn::Add(sum, hn::WidenMulPairwiseAdd(di32, hn::SatWidenMulPairwiseAdd(di16, w, x), hn::Set(di16, 1)));
  } else {
    const VI8 signed_w = hn::BitCast(di8, w);
    const VU8 size = hn::BitCast(du8, hn::Abs(signed_w));
    const VI8 turned = hn::IfNegativeThenNegOrUndefIfZero(signed_w, x);
    return hn::Add(sum, hn::WidenMulPairwiseAdd(di32, hn::SatWidenMulPairwiseAdd(di16, size, turned), hn::Set(di16, 1)));
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  return VI32(vdotq_s32(sum.raw, hn::BitCast(di8, w).raw, x.raw));
#else
  return hn::SumOfMulQuadAccumulate(di32, hn::BitCast(di8, w), x, sum);
#endif
}

// One chunk of weights as one (int8) or two (int4: even channels, odd channels) vectors of bytes.
template <int kBits>
HWY_INLINE void Unpack(VU8 raw, VU8& first, VU8& second) {
  if constexpr (kBits == 8) {
    first = Biased(8) ? hn::Xor(raw, hn::Set(du8, uint8_t{0x80})) : raw;
    second = first;
  } else if constexpr (Biased(4)) {
    const VU8 low = hn::Set(du8, uint8_t{0x0F});
    const VU8 biased = hn::Xor(raw, hn::Set(du8, uint8_t{0x88}));
    first = hn::And(biased, low);
    second = hn::And(hn::BitCast(du8, hn::ShiftRight<4>(hn::BitCast(du16, biased))), low);
  } else {
    first = hn::BitCast(du8, hn::ShiftRight<4>(hn::BitCast(di8, hn::ShiftLeft<4>(raw))));
    second = hn::BitCast(du8, hn::ShiftRight<4>(hn::BitCast(di8, raw)));
  }
}

// Up to kLanes block scales as floats; the rest is 0.
HWY_INLINE V LoadScales(const void* scales, bool half, size_t at, size_t count) {
  if (half) {
    const hn::Rebind<hwy::float16_t, D> dh;
    const auto* from = static_cast<const hwy::float16_t*>(scales) + at;
    return hn::PromoteTo(d, count >= kLanes ? hn::LoadU(dh, from) : hn::LoadN(dh, from, count));
  }
  const float* from = static_cast<const float*>(scales) + at;
  return count >= kLanes ? hn::LoadU(d, from) : hn::LoadN(d, from, count);
}

// Which scale of a group each lane of each of its chunks takes: lane l of chunk c is (c * kLanes + l) * per_lane / block.
template <size_t kPerLane, size_t kBlock>
struct ScaleIndex {
  static constexpr size_t kChunks = kBlock / kPerLane;
  alignas(64) int32_t at[kChunks * kLanes];
  constexpr ScaleIndex() : at() {
    for (size_t i = 0; i < kChunks * kLanes; ++i) at[i] = static_cast<int32_t>(i * kPerLane / kBlock);
  }
};

// M tokens by N rows of weights: pointers that walk, and the sums so far.
template <int kBits, size_t kBlock, size_t M, size_t N>
struct QuantizedTile {
  static constexpr size_t kPerLane = kBits == 4 ? 8 : 4;
  static constexpr size_t kChunkBytes = 4 * kLanes;
  static constexpr ScaleIndex<kPerLane, kBlock> kIndex{};
  const int8_t* values[M];
  const int32_t* offsets[M];
  const float* token_scales[M];
  const uint8_t* weights[N];
  const void* row_scales[N];
  size_t odd_at;   // int4: where the odd channels' values begin
  size_t ahead, scales_ahead;  // bytes to prefetch ahead: whole tiles, as rows are short and their streams end soon
  bool half;
  V acc[M][N];
  V scale[M][N];

  HWY_INLINE QuantizedTile(const QuantizedTokens& x, size_t token, const QuantizedRows& w, size_t row) {
    constexpr size_t kAhead = 4096;
    odd_at = x.padded_k() / 2, half = w.half_scales;
    const size_t tiles = kAhead / (N * w.row_bytes() + 1) + 1;
    ahead = tiles * N * w.row_bytes(), scales_ahead = tiles * N * w.blocks() * (half ? 2 : 4);
    for (size_t i = 0; i < M; ++i) {
      values[i] = x.values + (token + i) * x.padded_k();
      offsets[i] = x.offsets + (token + i) * x.padded_offsets();
      token_scales[i] = x.scales + (token + i) * x.padded_blocks();
    }
    for (size_t j = 0; j < N; ++j) {
      weights[j] = w.row(row + j), row_scales[j] = w.row_scales(row + j);
      for (size_t i = 0; i < M; ++i) acc[i][j] = hn::Zero(d);
    }
  }

  // The scales of group `group`, `left` of them.
  HWY_INLINE void Group(size_t group, size_t left) {
    for (size_t j = 0; j < N; ++j) {
      const V of_row = LoadScales(row_scales[j], half, group * kLanes, left);
      hwy::Prefetch(static_cast<const char*>(row_scales[j]) + group * kLanes * (half ? 2 : 4) + scales_ahead);
      for (size_t i = 0; i < M; ++i) scale[i][j] = hn::Mul(of_row, hn::LoadU(d, token_scales[i] + group * kLanes));
    }
  }

  // Chunk `chunk`, the `c`th of its group, of which `left` bytes are the rows' own.
  template <bool kWhole>
  HWY_INLINE void Chunk(size_t chunk, size_t c, size_t left) {
    const size_t at = chunk * kChunkBytes;
    const auto lanes = hn::IndicesFromVec(d, hn::Load(di32, kIndex.at + c * kLanes));
    VI8 first[M], second[M];
    VI32 start[M];
    for (size_t i = 0; i < M; ++i) {
      first[i] = hn::LoadU(di8, values[i] + at);
      if constexpr (kBits == 4) second[i] = hn::LoadU(di8, values[i] + odd_at + at);
      start[i] = Biased(kBits) ? hn::LoadU(di32, offsets[i] + chunk * kLanes) : hn::Zero(di32);
    }
    for (size_t j = 0; j < N; ++j) {
      VU8 w_first, w_second;
      hwy::Prefetch(weights[j] + at + ahead);
      Unpack<kBits>(kWhole ? hn::LoadU(du8, weights[j] + at) : hn::LoadN(du8, weights[j] + at, left), w_first, w_second);
      for (size_t i = 0; i < M; ++i) {
        VI32 sum = Dot<kBits>(start[i], w_first, first[i]);
        if constexpr (kBits == 4) sum = Dot<kBits>(sum, w_second, second[i]);
        acc[i][j] = hn::MulAdd(hn::ConvertTo(d, sum), hn::TableLookupLanes(scale[i][j], lanes), acc[i][j]);
      }
    }
  }

  HWY_INLINE void Run(size_t blocks, size_t bytes) {
    constexpr size_t kChunks = ScaleIndex<kPerLane, kBlock>::kChunks;
    const size_t whole = bytes / kChunkBytes, groups = whole / kChunks;
    for (size_t group = 0; group < groups; ++group) {
      Group(group, kLanes);
      for (size_t c = 0; c < kChunks; ++c) Chunk<true>(group * kChunks + c, c, kChunkBytes);
    }
    if (groups * kChunks * kChunkBytes == bytes) return;
    Group(groups, blocks - groups * kLanes);
    for (size_t chunk = groups * kChunks; chunk < whole; ++chunk) Chunk<true>(chunk, chunk - groups * kChunks, kChunkBytes);
    if (whole * kChunkBytes < bytes) Chunk<false>(whole, whole - groups * kChunks, bytes - whole * kChunkBytes);
  }

  HWY_INLINE void Store(float* HWY_RESTRICT y, size_t ldy) const {
    for (size_t i = 0; i < M; ++i) {
      if constexpr (N == 4) {
        StoreSums(acc[i][0], acc[i][1], acc[i][2], acc[i][3], y + i * ldy);
      } else {
        for (size_t j = 0; j < N; ++j) y[i * ldy + j] = hn::ReduceSum(d, acc[i][j]);
      }
    }
  }
};

template <int kBits, size_t kBlock, size_t M, size_t N>
HWY_INLINE void RunTile(const QuantizedTokens& x, size_t token, const QuantizedRows& w, size_t row, float* y, size_t ldy) {
  QuantizedTile<kBits, kBlock, M, N> tile(x, token, w, row);
  tile.Run(w.blocks(), w.row_bytes());
  tile.Store(y, ldy);
}

template <int kBits, size_t kBlock, size_t M>
HWY_INLINE void QuantizedRowsOf(const QuantizedTokens& x, size_t token, const QuantizedRows& w, size_t first, size_t n, float* y,
                                size_t ldy) {
  size_t j = 0;
  for (; j + 4 <= n; j += 4) RunTile<kBits, kBlock, M, 4>(x, token, w, first + j, y + j, ldy);
  for (; j < n; ++j) RunTile<kBits, kBlock, M, 1>(x, token, w, first + j, y + j, ldy);
}

template <int kBits, size_t kBlock>
void MatMulQuantizedOf(const QuantizedTokens& x, size_t m, const QuantizedRows& w, size_t first, size_t n, float* y, size_t ldy) {
  size_t i = 0;
  for (; i + 2 <= m; i += 2) QuantizedRowsOf<kBits, kBlock, 2>(x, i, w, first, n, y + i * ldy, ldy);
  for (; i < m; ++i) QuantizedRowsOf<kBits, kBlock, 1>(x, i, w, first, n, y + i * ldy, ldy);
}

void MatMulQuantized(const QuantizedTokens& x, size_t m, const QuantizedRows& w, size_t first, size_t n, float* y, size_t ldy) {
  const bool four = w.bits == 4;
  if (w.block == 32) return (four ? MatMulQuantizedOf<4, 32> : MatMulQuantizedOf<8, 32>)(x, m, w, first, n, y, ldy);
  if (w.block == 64) return (four ? MatMulQuantizedOf<4, 64> : MatMulQuantizedOf<8, 64>)(x, m, w, first, n, y, ldy);
  return (four ? MatMulQuantizedOf<4, 128> : MatMulQuantizedOf<8, 128>)(x, m, w, first, n, y, ldy);
}

// Floats from `from` on; past `count` they are 0.
HWY_INLINE V LoadUpTo(const float* from, size_t count) { return count >= kLanes ? hn::LoadU(d, from) : hn::LoadN(d, from, count); }

// The largest magnitude of n numbers, load(at) those from `at` on and zeros behind them: by the bits, which order as the numbers do,
// infinity and NaN above all.
template <typename Load>
HWY_INLINE float Largest(size_t n, const Load& load) {
  VI32 top = hn::Zero(di32);
  for (size_t at = 0; at < n; at += kLanes) top = hn::Max(top, hn::BitCast(di32, hn::Abs(load(at))));
  const int32_t bits = hn::ReduceMax(di32, top);
  float largest;
  hwy::CopyBytes<4>(&bits, &largest);
  return largest;
}

void Quantize(const float* x, size_t k, size_t block, int8_t* q, float* scales) {
  for (size_t b = 0; b * block < k; ++b) {
    const float* from = x + b * block;
    const size_t n = HWY_MIN(block, k - b * block);
    const float largest = Largest(n, [&](size_t at) HWY_ATTR { return LoadUpTo(from + at, n - at); });
    scales[b] = largest / 127.0f;
    const V inverse = hn::Set(d, largest > 1e-30f ? 127.0f / largest : 0.0f);
    const hn::Rebind<int8_t, D> narrow;
    int8_t* to = q + b * block;
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      hn::StoreU(hn::DemoteTo(narrow, hn::NearestInt(hn::Mul(hn::LoadU(d, from + i), inverse))), narrow, to + i);
    if (i < n)
      hn::StoreN(hn::DemoteTo(narrow, hn::NearestInt(hn::Mul(hn::LoadN(d, from + i, n - i), inverse))), narrow, to + i, n - i);
  }
}

// A true quotient, as QuantizeLinear has it: a product with 1 / scale would round some numbers to the next level.
HWY_INLINE V StaticLevels(V x, V scale) {
  return hn::Max(hn::Min(hn::Div(x, scale), hn::Set(d, 127.0f)), hn::Set(d, -127.0f));
}

void QuantizeStatic(const float* x, size_t k, size_t block, float scale, int8_t* q, float* scales) {
  const V step = hn::Set(d, scale);
  const hn::Rebind<int8_t, D> narrow;
  for (size_t b = 0; b * block < k; ++b) {
    const float* from = x + b * block;
    int8_t* to = q + b * block;
    const size_t n = HWY_MIN(block, k - b * block);
    V kept = step;  // what is NaN once stays so
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const V v = hn::LoadU(d, from + i);
      kept = hn::IfThenElse(hn::IsNaN(v), v, kept);
      hn::StoreU(hn::DemoteTo(narrow, hn::NearestInt(StaticLevels(v, step))), narrow, to + i);
    }
    if (i < n) {
      const V v = hn::LoadN(d, from + i, n - i);
      kept = hn::IfThenElse(hn::IsNaN(v), v, kept);
      hn::StoreN(hn::DemoteTo(narrow, hn::NearestInt(StaticLevels(v, step))), narrow, to + i, n - i);
    }
    scales[b] = hn::AllFalse(d, hn::IsNaN(kept)) ? scale : hn::GetLane(hn::NaN(d));
  }
}

// Sums of four neighbouring bytes, times minus the bias of the weights.
HWY_INLINE VI32 NegativeBias(VI8 x, int bias) {
  const VI32 sums = hn::SumOfMulQuadAccumulate(di32, hn::Set(du8, uint8_t{1}), x, hn::Zero(di32));
  return hn::Mul(sums, hn::Set(di32, -bias));
}

void PackRow(const int8_t* q, const QuantizedTokens& out, size_t token) {
  const size_t padded = out.padded_k();
  int8_t* values = out.values + token * padded;
  int32_t* offsets = out.offsets + token * out.padded_offsets();
  constexpr size_t kBytes = 4 * kLanes;
  if (out.bits == 8) {
    hwy::CopyBytes(q, values, padded);
    if (Biased(8))
      for (size_t at = 0; at < padded; at += kBytes) hn::StoreU(NegativeBias(hn::LoadU(di8, q + at), 128), di32, offsets + at / 4);
    return;
  }
  for (size_t at = 0; at < padded / 2; at += kBytes) {
    VI8 even, odd;
    hn::LoadInterleaved2(di8, q + 2 * at, even, odd);
    hn::StoreU(even, di8, values + at);
    hn::StoreU(odd, di8, values + padded / 2 + at);
    if (Biased(4)) hn::StoreU(hn::Add(NegativeBias(even, 8), NegativeBias(odd, 8)), di32, offsets + at / 4);
  }
}

void Dequantize(const QuantizedRows& w, size_t row, float* out) {
  const uint8_t* from = w.row(row);
  for (size_t b = 0; b < w.blocks(); ++b) {
    const float scale = hn::GetLane(LoadScales(w.row_scales(row), w.half_scales, b, 1));
    for (size_t i = b * w.block; i < HWY_MIN(w.k, (b + 1) * w.block); ++i) {
      const int nibble = from[i / 2] >> (i % 2 * 4) & 15;
      const int value = w.bits == 8 ? static_cast<int8_t>(from[i]) : (nibble ^ 8) - 8;
      out[i] = scale * static_cast<float>(value);
    }
  }
}
