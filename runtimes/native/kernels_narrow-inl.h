// Attention over rows as they are stored: part of kernels.cc, compiled once per instruction set, for processors that multiply
// 16-bit numbers in pairs and add both products to a 32-bit sum (vdpbf16ps, vpdpwssd, bfdot).

constexpr size_t kPairLanes = 2 * kLanes;

// Floats [at, at + kLanes) of x[n], times scales[n] where there are any; past n they are 0.
HWY_INLINE V LoadScaled(const float* x, const float* scales, size_t at, size_t n) {
  if (at >= n) return hn::Zero(d);
  const V v = LoadUpTo(x + at, n - at);
  return scales == nullptr ? v : hn::Mul(v, LoadUpTo(scales + at, n - at));
}

#if HWY_NATIVE_DOT_BF16
// bfloat16 rows. A query is split into a bfloat16 and the bfloat16 of what that leaves: the error of one rounding alone is common
// to all rows, and where values are keys (MLA) it does not average out.
struct BFloat16Rows {
  using Stored = hwy::bfloat16_t;
  using Tag = hn::Repartition<hwy::bfloat16_t, D>;
  using Sum = V;
  static constexpr size_t kParts = 2;
  static constexpr size_t kMostK = SIZE_MAX;

  static HWY_INLINE Sum Zero() { return hn::Zero(d); }
  static HWY_INLINE V ToFloat(Sum sum) { return sum; }
  static HWY_INLINE Sum AddPairs(Sum sum, hn::Vec<Tag> a, hn::Vec<Tag> b) {
    V unused = hn::Zero(d);
    return hn::ReorderWidenMulAccumulate(d, a, b, sum, unused);
  }

  static float RoundQuery(const float* x, size_t n, void* out) {
    const Tag tag;
    auto* to = static_cast<hwy::bfloat16_t*>(out);
    for (size_t at = 0; at < n; at += kPairLanes) {
      const V a = LoadScaled(x, nullptr, at, n), b = LoadScaled(x, nullptr, at + kLanes, n);
      const auto first = hn::OrderedDemote2To(tag, a, b);
      const V rest_a = hn::Sub(a, hn::PromoteLowerTo(d, first)), rest_b = hn::Sub(b, hn::PromoteUpperTo(d, first));
      hn::StoreU(first, tag, to + at);
      hn::StoreU(hn::OrderedDemote2To(tag, rest_a, rest_b), tag, to + PaddedToNarrow(n) + at);
    }
    return 1.0f;
  }
  static float RoundWeights(const float* x, const float* scales, size_t n, void* out) {
    const Tag tag;
    for (size_t at = 0; at < n; at += kPairLanes)
      hn::StoreU(hn::OrderedDemote2To(tag, LoadScaled(x, scales, at, n), LoadScaled(x, scales, at + kLanes, n)), tag,
                 static_cast<hwy::bfloat16_t*>(out) + at);
    return 1.0f;
  }
};
#endif

#if MYTHOS_VNNI
// int8 rows, widened to 16 bits; queries, and weights of rows, are rounded to 16-bit integers with a scale for each query.
struct Int8Rows {
  using Stored = int8_t;
  using Tag = DI16;
  using Sum = Sums;
  static constexpr size_t kParts = 1;
  static constexpr size_t kMostK = 4096;

  static HWY_INLINE Sum Zero() { return Wrap(hn::Zero(di32)); }
  static HWY_INLINE V ToFloat(Sum sum) { return hn::ConvertTo(d, Unwrap(sum)); }
  static HWY_INLINE Sum AddPairs(Sum sum, hn::Vec<Tag> a, hn::Vec<Tag> b) {
    VI32 unused = hn::Zero(di32);
    return Wrap(hn::ReorderWidenMulAccumulate(di32, a, b, Unwrap(sum), unused));
  }

  static float RoundQuery(const float* x, size_t n, void* out) { return RoundWeights(x, nullptr, n, out); }
  static float RoundWeights(const float* x, const float* scales, size_t n, void* out) {
    const float largest = Largest(n, [&](size_t at) HWY_ATTR { return LoadScaled(x, scales, at, n); });
    const V inverse = hn::Set(d, largest > 1e-30f ? 32767.0f / largest : 0.0f);
    for (size_t at = 0; at < n; at += kPairLanes) {
      const VI32 a = hn::NearestInt(hn::Mul(LoadScaled(x, scales, at, n), inverse));
      const VI32 b = hn::NearestInt(hn::Mul(LoadScaled(x, scales, at + kLanes, n), inverse));
      hn::StoreU(hn::OrderedDemote2To(di16, a, b), di16, static_cast<int16_t*>(out) + at);
    }
    return largest / 32767.0f;
  }
};
#endif

// Of a struct of these, what its rows and roundings hold.
template <class R>
using Stored = typename R::Stored;
template <class R>
using Number = hn::TFromD<typename R::Tag>;
template <class R>
using Numbers = hn::Vec<typename R::Tag>;

// kPairLanes numbers of a stored row, or with kWhole false `count` of them and zeros.
template <class R, bool kWhole>
HWY_INLINE Numbers<R> LoadStored(const Stored<R>* from, size_t count) {
  const typename R::Tag to;
  const hn::Rebind<Stored<R>, typename R::Tag> stored;
  const auto v = kWhole ? hn::LoadU(stored, from) : hn::LoadN(stored, from, count);
  if constexpr (sizeof(Stored<R>) == 1) {
    return hn::PromoteTo(to, v);
  } else {
    return v;
  }
}

// M queries [parts][padded k] by N rows.
template <class R, size_t M, size_t N>
HWY_INLINE void NarrowDotTile(const Number<R>* HWY_RESTRICT x, const Stored<R>* HWY_RESTRICT w, size_t ldw, size_t k,
                              float* HWY_RESTRICT y, size_t ldy) {
  const typename R::Tag tag;
  const size_t part = PaddedToNarrow(k);
  typename R::Sum acc[M][N];
  for (size_t i = 0; i < M; ++i)
    for (size_t j = 0; j < N; ++j) acc[i][j] = R::Zero();
  size_t at = 0;
  for (; at + kPairLanes <= k; at += kPairLanes) {
    Numbers<R> xs[R::kParts][M];
    for (size_t p = 0; p < R::kParts; ++p)
      for (size_t i = 0; i < M; ++i) xs[p][i] = hn::LoadU(tag, x + (i * R::kParts + p) * part + at);
    for (size_t j = 0; j < N; ++j) {
      const Numbers<R> ws = LoadStored<R, true>(w + j * ldw + at, kPairLanes);
      for (size_t p = 0; p < R::kParts; ++p)
        for (size_t i = 0; i < M; ++i) acc[i][j] = R::AddPairs(acc[i][j], xs[p][i], ws);
    }
  }
  if (at < k) {
    HWY_UNROLL(4)  // else gcc keeps the sums in memory
    for (size_t j = 0; j < N; ++j) {
      const Numbers<R> ws = LoadStored<R, false>(w + j * ldw + at, k - at);
      for (size_t p = 0; p < R::kParts; ++p)
        for (size_t i = 0; i < M; ++i)
          acc[i][j] = R::AddPairs(acc[i][j], hn::LoadU(tag, x + (i * R::kParts + p) * part + at), ws);
    }
  }
  for (size_t i = 0; i < M; ++i) {
    if constexpr (N == 4) {
      StoreSums(R::ToFloat(acc[i][0]), R::ToFloat(acc[i][1]), R::ToFloat(acc[i][2]), R::ToFloat(acc[i][3]), y + i * ldy);
    } else {
      for (size_t j = 0; j < N; ++j) y[i * ldy + j] = hn::ReduceSum(d, R::ToFloat(acc[i][j]));
    }
  }
}

template <class R, size_t M>
HWY_INLINE void NarrowDotRows(const Number<R>* x, const Stored<R>* w, size_t ldw, size_t n, size_t k, float* y,
                              size_t ldy) {
  size_t j = 0;
  for (; j + 4 <= n; j += 4) NarrowDotTile<R, M, 4>(x, w + j * ldw, ldw, k, y + j, ldy);
  for (; j < n; ++j) NarrowDotTile<R, M, 1>(x, w + j * ldw, ldw, k, y + j, ldy);
}

template <class R>
void NarrowNT(const void* x, const float* factors, size_t m, const void* w, const float* scales, size_t ldw, size_t n, size_t k,
              float* y, size_t ldy) {
  const auto* queries = static_cast<const Number<R>*>(x);
  const auto* rows = static_cast<const Stored<R>*>(w);
  const size_t ldx = R::kParts * PaddedToNarrow(k);
  size_t i = 0;
  for (; i + 4 <= m; i += 4) NarrowDotRows<R, 4>(queries + i * ldx, rows, ldw, n, k, y + i * ldy, ldy);
  for (; i + 2 <= m; i += 2) NarrowDotRows<R, 2>(queries + i * ldx, rows, ldw, n, k, y + i * ldy, ldy);
  for (; i < m; ++i) NarrowDotRows<R, 1>(queries + i * ldx, rows, ldw, n, k, y + i * ldy, ldy);
  if (scales == nullptr) return;
  for (i = 0; i < m; ++i) {
    float* row = y + i * ldy;
    const V factor = hn::Set(d, factors[i]);
    for (size_t j = 0; j < n; j += kLanes) {
      const size_t count = HWY_MIN(kLanes, n - j);
      hn::StoreN(hn::Mul(hn::LoadN(d, row + j, count), hn::Mul(factor, hn::LoadN(d, scales + j, count))), d, row + j, count);
    }
  }
}

// to[count] += sum * factor.
template <bool kWhole>
HWY_INLINE void AddTo(V sum, V factor, float* HWY_RESTRICT to, size_t count) {
  if constexpr (kWhole) {
    hn::StoreU(hn::MulAdd(sum, factor, hn::LoadU(d, to)), d, to);
  } else {
    hn::StoreN(hn::MulAdd(sum, factor, hn::LoadN(d, to, count)), d, to, count);
  }
}

// M rows of y, N chunks of channels wide; with kWhole false, one of which only `count` are the rows' own. Rows are taken in pairs;
// the weight behind an odd number of them is 0.
template <class R, bool kWhole, size_t M, size_t N>
HWY_INLINE void NarrowAccumulateTile(const Number<R>* HWY_RESTRICT x, size_t ldx, const float* factors,
                                     const Stored<R>* HWY_RESTRICT w, size_t ldw, size_t k, size_t count,
                                     float* HWY_RESTRICT y, size_t ldy) {
  const typename R::Tag tag;
  typename R::Sum acc[M][2 * N];
  for (size_t i = 0; i < M; ++i)
    for (size_t j = 0; j < 2 * N; ++j) acc[i][j] = R::Zero();
  for (size_t at = 0; at < k; at += 2) {
    const auto* even = w + at * ldw;
    const auto* odd = at + 1 < k ? even + ldw : even;
    Numbers<R> ws[2 * N];
    for (size_t j = 0; j < N; ++j) {
      const auto a = hn::BitCast(du16, LoadStored<R, kWhole>(even + j * kPairLanes, count));
      const auto b = hn::BitCast(du16, LoadStored<R, kWhole>(odd + j * kPairLanes, count));
      ws[2 * j] = hn::BitCast(tag, hn::InterleaveWholeLower(du16, a, b));
      ws[2 * j + 1] = hn::BitCast(tag, hn::InterleaveWholeUpper(du16, a, b));
    }
    for (size_t i = 0; i < M; ++i) {
      uint32_t pair;
      hwy::CopyBytes<4>(x + i * ldx + at, &pair);
      const Numbers<R> xs = hn::BitCast(tag, hn::Set(du32, pair));
      for (size_t j = 0; j < 2 * N; ++j) acc[i][j] = R::AddPairs(acc[i][j], xs, ws[j]);
    }
  }
  for (size_t i = 0; i < M; ++i) {
    const V factor = hn::Set(d, factors[i]);
    for (size_t j = 0; j < 2 * N; ++j) {
      const size_t before = j * kLanes, left = kWhole ? kLanes : count <= before ? 0 : HWY_MIN(kLanes, count - before);
      AddTo<kWhole>(R::ToFloat(acc[i][j]), factor, y + i * ldy + before, left);
    }
  }
}

template <class R, bool kWhole, size_t N>
HWY_INLINE void NarrowAccumulateRows(const Number<R>* x, size_t ldx, const float* factors, size_t m, const Stored<R>* w,
                                     size_t ldw, size_t k, size_t count, float* y, size_t ldy) {
  size_t i = 0;
  if constexpr (kWhole && N == 1)
    for (; i + 8 <= m; i += 8)
      NarrowAccumulateTile<R, true, 8, 1>(x + i * ldx, ldx, factors + i, w, ldw, k, count, y + i * ldy, ldy);
  for (; i + 4 <= m; i += 4)
    NarrowAccumulateTile<R, kWhole, 4, N>(x + i * ldx, ldx, factors + i, w, ldw, k, count, y + i * ldy, ldy);
  for (; i + 2 <= m; i += 2)
    NarrowAccumulateTile<R, kWhole, 2, N>(x + i * ldx, ldx, factors + i, w, ldw, k, count, y + i * ldy, ldy);
  for (; i < m; ++i) NarrowAccumulateTile<R, kWhole, 1, N>(x + i * ldx, ldx, factors + i, w, ldw, k, count, y + i * ldy, ldy);
}

template <class R>
void NarrowNN(const void* x, size_t ldx, const float* factors, size_t m, const void* w, size_t ldw, size_t k, size_t n, float* y,
              size_t ldy) {
  const auto* weights = static_cast<const Number<R>*>(x);
  const auto* rows = static_cast<const Stored<R>*>(w);
  size_t j = 0;
  if (m < 8)  // few rows: wider, so that as many sums run at a time
    for (; j + 2 * kPairLanes <= n; j += 2 * kPairLanes)
      NarrowAccumulateRows<R, true, 2>(weights, ldx, factors, m, rows + j, ldw, k, kPairLanes, y + j, ldy);
  for (; j + kPairLanes <= n; j += kPairLanes)
    NarrowAccumulateRows<R, true, 1>(weights, ldx, factors, m, rows + j, ldw, k, kPairLanes, y + j, ldy);
  if (j < n) NarrowAccumulateRows<R, false, 1>(weights, ldx, factors, m, rows + j, ldw, k, n - j, y + j, ldy);
}

template <class R>
constexpr NarrowKernels kNarrow{R::kParts, R::kMostK, R::RoundQuery, R::RoundWeights, NarrowNT<R>, NarrowNN<R>};

const NarrowKernels* Narrow(CacheType type) {
#if HWY_NATIVE_DOT_BF16
  if (type == CacheType::kBFloat16) return &kNarrow<BFloat16Rows>;
#endif
#if MYTHOS_VNNI
  if (type == CacheType::kInt8) return &kNarrow<Int8Rows>;
#endif
  static_cast<void>(type);
  return nullptr;
}
