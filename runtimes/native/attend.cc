#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mythos {

void Rotate(const float* in, const float* cos, const float* sin, size_t half, float* out) {
  for (size_t i = 0; i < half; ++i) {
    const float first = in[i], second = in[i + half];
    out[i] = first * cos[i] - second * sin[i];
    out[i + half] = second * cos[i] + first * sin[i];
  }
}

namespace {

// Nearest, ties to even; IEEE 754 binary16.
uint16_t HalfOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::abs(x);
  if (std::isnan(x)) return 0x7E00;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < 6.103515625e-05f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f));
  bits &= 0x7FFFFFFF;
  bits += 0xFFF + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits >> 13) - (112u << 10));
}

// Nearest, ties to even.
uint16_t BFloat16Of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Levels of a fixed scale, ties to even; what lies beyond 127 levels is cut off (a NaN too, to be something defined).
void Levels(const float* row, size_t n, float scale, int8_t* to) {
  const float inverse = 1.0f / scale;
  for (size_t i = 0; i < n; ++i)
    to[i] = static_cast<int8_t>(std::nearbyint(std::min(127.0f, std::max(-127.0f, row[i] * inverse))));
}

}  // namespace

void NewRows::Store(size_t t, float* row, size_t width, const Kernels& k) const {
  if (type == CacheType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + t * width, row, width * sizeof(float));
    return;
  }
  char* to = static_cast<char*>(data) + t * width * SizeOf(type);
  float scale = 1.0f;
  if (type == CacheType::kInt8) {
    if (row_scale > 0.0f)
      Levels(row, width, scale = row_scale, reinterpret_cast<int8_t*>(to));
    else
      k.quantize(row, width, width, reinterpret_cast<int8_t*>(to), &scale);
    scales[t] = scale;
  } else {
    for (size_t i = 0; i < width; ++i)
      reinterpret_cast<uint16_t*>(to)[i] = type == CacheType::kFloat16 ? HalfOf(row[i]) : BFloat16Of(row[i]);
  }
  k.widen(type, to, width, scale, row);
}

void Start(SoftmaxRow* state, float* acc, size_t m, size_t value_dim) {
  std::fill(acc, acc + m * value_dim, 0.0f);
  for (size_t i = 0; i < m; ++i) state[i] = {-std::numeric_limits<float>::max(), 0.0f};
}

namespace {

// One group's part of a step's rows, as they are stored. scales: of int8 rows.
struct Block {
  const char *keys, *values;
  size_t row_bytes;
  const float* scales;

  Block(const Rows& rows, size_t group, size_t first)
      : keys(rows.row(first) + (rows.keys_at + group * rows.step) * SizeOf(rows.type)),
        values(rows.row(first) + (rows.values_at + group * rows.step) * SizeOf(rows.type)),
        row_bytes(rows.width * SizeOf(rows.type)),
        scales(rows.type == CacheType::kInt8 ? rows.scales + first : nullptr) {}
};

// Products with the rows of a step as floats: where they lie, or widened into a buffer.
class FloatProducts {
 public:
  FloatProducts(const Queries& q, const Rows& rows, const Kernels& k)
      : q_(q), rows_(rows), k_(k), buffer_(rows.type == CacheType::kFloat32 ? 0 : kRowBlock * (q.key_dim + q.value_dim)) {}

  // The next products are with n rows from `first` on, for one group.
  void Open(size_t group, size_t first, size_t n) {
    queries_ = q_.values + group * q_.m * q_.key_dim;
    acc_ = q_.acc + group * q_.m * q_.value_dim;
    const Block block(rows_, group, first);
    if (rows_.type != CacheType::kFloat32) return Widen(block, n);
    keys_ = reinterpret_cast<const float*>(block.keys), values_ = reinterpret_cast<const float*>(block.values);
    stride_ = rows_.width;
  }
  // scores [m, kRowBlock] of n of them from r on.
  void Score(size_t r, size_t n, float* scores) const {
    k_.matmul_nt(queries_, q_.key_dim, q_.m, keys_ + r * stride_, stride_, n, q_.key_dim, scores + r, kRowBlock);
  }
  // Takes the weights [m, kRowBlock] of all n, for Accumulate.
  void SetWeights(const float* weights, size_t) { weights_ = weights; }
  void Accumulate(size_t r, size_t n) const {
    k_.matmul_nn(weights_ + r, kRowBlock, q_.m, values_ + r * stride_, stride_, n, q_.value_dim, acc_, q_.value_dim);
  }

 private:
  void Widen(const Block& block, size_t n) {
    const bool inside = block.keys == block.values;  // the values are the keys' first channels
    float* buffer = buffer_.get();
    stride_ = inside ? q_.key_dim : q_.key_dim + q_.value_dim;
    keys_ = buffer, values_ = inside ? buffer : buffer + q_.key_dim;
    for (size_t r = 0; r < n; ++r) {
      const float scale = block.scales == nullptr ? 1.0f : block.scales[r];
      k_.widen(rows_.type, block.keys + r * block.row_bytes, q_.key_dim, scale, buffer + r * stride_);
      if (inside) continue;
      k_.widen(rows_.type, block.values + r * block.row_bytes, q_.value_dim, scale, buffer + r * stride_ + q_.key_dim);
    }
  }

  const Queries& q_;
  const Rows& rows_;
  const Kernels& k_;
  Scratch buffer_;
  size_t stride_ = 0;
  const float *queries_ = nullptr, *keys_ = nullptr, *values_ = nullptr, *weights_ = nullptr;
  float* acc_ = nullptr;
};

// The same with the rows as they are stored.
class NarrowProducts {
 public:
  NarrowProducts(const Queries& q, const Rows& rows, const NarrowKernels& k)
      : q_(q), rows_(rows), k_(k), query_size_(k.parts * PaddedToNarrow(q.key_dim)),
        queries_(q.groups * q.m * query_size_ / 2), weights_(q.m * kRowBlock / 2), factors_(q.groups * q.m + q.m),
        block_(rows, 0, 0) {
    for (size_t i = 0; i < q.groups * q.m; ++i)
      factors_.get()[i] = k.round_query(q.values + i * q.key_dim, q.key_dim, Query(i));
  }

  void Open(size_t group, size_t first, size_t) { group_ = group, block_ = Block(rows_, group, first); }
  void Score(size_t r, size_t n, float* scores) const {
    const size_t query = group_ * q_.m;
    k_.matmul_nt(Query(query), factors_.get() + query, q_.m, block_.keys + r * block_.row_bytes,
                 block_.scales == nullptr ? nullptr : block_.scales + r, rows_.width, n, q_.key_dim, scores + r, kRowBlock);
  }
  void SetWeights(const float* weights, size_t n) {
    for (size_t i = 0; i < q_.m; ++i)
      WeightFactors()[i] = k_.round_weights(weights + i * kRowBlock, block_.scales, n, Weights() + i * kRowBlock);
  }
  void Accumulate(size_t r, size_t n) const {
    k_.matmul_nn(Weights() + r, kRowBlock, WeightFactors(), q_.m, block_.values + r * block_.row_bytes, rows_.width, n,
                 q_.value_dim, q_.acc + group_ * q_.m * q_.value_dim, q_.value_dim);
  }

 private:
  uint16_t* Query(size_t i) const { return reinterpret_cast<uint16_t*>(queries_.get()) + i * query_size_; }
  uint16_t* Weights() const { return reinterpret_cast<uint16_t*>(weights_.get()); }
  float* WeightFactors() const { return factors_.get() + q_.groups * q_.m; }

  const Queries& q_;
  const Rows& rows_;
  const NarrowKernels& k_;
  const size_t query_size_;
  Scratch queries_, weights_, factors_;
  Block block_;
  size_t group_ = 0;
};

// Rows a step: with several groups, few enough that what one group leaves of a row is still in the cache for the next.
size_t RowsAStep(const Queries& q, const Rows& rows) {
  constexpr size_t kBytes = 128 * 1024, kFewest = 16;
  return q.groups == 1 ? kRowBlock : std::clamp(kBytes / (rows.width * SizeOf(rows.type)), kFewest, kRowBlock);
}

// The rows that come next, asked for a little at a time between pieces of work: groups read pieces of rows, which no hardware
// prefetcher follows, and many requests at once would hold up the arithmetic.
class Ahead {
 public:
  Ahead(const Rows& rows, size_t first, size_t n, size_t times)
      : at_(rows.row(first)), end_(rows.row(first + n)), share_(CeilDiv(static_cast<size_t>(end_ - at_), times * kLine) * kLine) {}
  void Ask() {
    const char* stop = std::min(end_, at_ + share_);
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_);
  }

 private:
  static constexpr size_t kLine = 64;
  const char *at_, *end_;
  size_t share_;
};

// Turns the scores [m, kRowBlock] of a step's n rows from `start` into weights, 0 for rows that a query does not see.
void Weigh(const Queries& q, size_t group, size_t start, size_t n, float* scores, const Kernels& k) {
  for (size_t i = 0; i < q.m; ++i) {
    float* row = scores + i * kRowBlock;
    const size_t to = std::min(n, q.to[i] <= start ? 0 : q.to[i] - start);
    const size_t from = std::min(to, q.from[i] <= start ? 0 : q.from[i] - start);
    if (from < to) {
      const float correction = k.online_softmax(row + from, to - from, &q.state[group * q.m + i]);
      if (correction != 1.0f) k.scale(q.acc + (group * q.m + i) * q.value_dim, correction, q.value_dim);
    }
    std::fill(row, row + from, 0.0f);
    std::fill(row + to, row + n, 0.0f);
  }
}

template <typename Products>
void AttendWith(const Queries& q, const Rows& rows, Products products, const Kernels& k) {
  const size_t end = std::min(rows.count, *std::max_element(q.to, q.to + q.m)), step = RowsAStep(q, rows);
  const size_t most = q.groups == 1 ? kRowBlock : 16 / SizeOf(rows.type);  // rows between two requests for later ones
  const Scratch scratch(q.m * kRowBlock);
  float* scores = scratch.get();
  for (size_t start = *std::min_element(q.from, q.from + q.m) / step * step; start < end; start += step) {
    const size_t n = std::min(step, end - start), next = start + n, piece = std::min(n, most);
    Ahead ahead(rows, next, q.groups == 1 ? 0 : std::min(step, end - next), q.groups * 2 * CeilDiv(n, piece));
    for (size_t group = 0; group < q.groups; ++group) {
      products.Open(group, start, n);
      for (size_t r = 0; r < n; r += piece) {
        ahead.Ask();
        products.Score(r, std::min(piece, n - r), scores);
      }
      Weigh(q, group, start, n, scores, k);
      products.SetWeights(scores, n);
      for (size_t r = 0; r < n; r += piece) {
        ahead.Ask();
        products.Accumulate(r, std::min(piece, n - r));
      }
    }
  }
}

}  // namespace

void Attend(const Queries& q, const Rows& rows, const Kernels& k) {
  if (rows.count == 0) return;
  const NarrowKernels* narrow = k.narrow(rows.type);
  if (narrow != nullptr && q.key_dim <= narrow->most_k) return AttendWith(q, rows, NarrowProducts(q, rows, *narrow), k);
  AttendWith(q, rows, FloatProducts(q, rows, k), k);
}

void Attend(const Queries& q, const Past& past, const Kernels& k) {
  Attend(q, past.rows, k);
  if (past.wrapped.count == 0) return;
  std::vector<size_t> from(q.from, q.from + q.m), to(q.to, q.to + q.m);
  for (size_t* ends : {from.data(), to.data()})
    for (size_t i = 0; i < q.m; ++i) ends[i] -= std::min(ends[i], past.rows.count);
  Attend({q.values, q.groups, q.m, q.key_dim, q.value_dim, from.data(), to.data(), q.acc, q.state}, past.wrapped, k);
}

Cut::Cut(size_t seq, size_t n_heads)
    : tokens(seq == 1 ? 1 : std::min(seq, kTokenTile)),
      heads(seq == 1 ? std::min(n_heads, kHeadTile) : 1),
      token_tiles(CeilDiv(seq, tokens)),
      head_tiles(CeilDiv(n_heads, heads)) {}

Splits::Splits(size_t seq, size_t batch, size_t capacity, const int64_t* past_len) : rows(0), most(0) {
  constexpr size_t kLong = 256, kFewest = 128, kMost = 1024, kAimedAt = 8;
  const size_t longest = std::min(capacity, static_cast<size_t>(*std::max_element(past_len, past_len + batch)));
  if (seq != 1 || longest <= kLong) return;
  rows = std::clamp(CeilDiv(longest / kAimedAt, kRowBlock) * kRowBlock, kFewest, kMost);
  most = CeilDiv(longest, rows);
}

namespace {

// Adds what one split has gathered for one query to what the others have.
void Join(SoftmaxRow* into, float* acc, const SoftmaxRow& from, const float* from_acc, size_t value_dim, const Kernels& k) {
  if (from.sum == 0.0f) return;
  const float top = std::max(into->max, from.max);
  const float old = std::exp(into->max - top), fresh = std::exp(from.max - top);
  *into = {top, into->sum * old + from.sum * fresh};
  k.scale(acc, old, value_dim);
  k.axpy(acc, from_acc, fresh, value_dim);
}

}  // namespace

void AttendSplits(const Splits& splits, const DecodeShape& shape, const float* queries, const std::function<Past(size_t)>& rows_of,
                  const std::function<size_t(size_t)>& first_of, SoftmaxRow* states, float* acc, const Kernels& k,
                  const Parallel& parallel) {
  const size_t heads = shape.heads(), tasks = shape.batch * splits.most, value_dim = shape.value_dim;
  Scratch partial(tasks * heads * value_dim);
  std::vector<SoftmaxRow> partial_states(tasks * heads);
  ForEach(parallel, tasks, [&](size_t task) {
    const size_t b = task / splits.most, first = task % splits.most * splits.rows;
    float* to = partial.get() + task * heads * value_dim;
    SoftmaxRow* state = partial_states.data() + task * heads;
    Start(state, to, heads, value_dim);
    const Past rows = rows_of(b);
    const size_t visible = first_of(b), n = first >= rows.count() ? 0 : std::min(splits.rows, rows.count() - first);
    if (n == 0 || visible >= first + n) return;
    const std::vector<size_t> from(shape.m, visible <= first ? 0 : visible - first), end(shape.m, n);
    const float* of_sequence = queries + b * heads * shape.key_dim;
    Attend({of_sequence, shape.groups, shape.m, shape.key_dim, value_dim, from.data(), end.data(), to, state},
           rows.From(first, n), k);
  });
  const size_t n_queries = shape.batch * heads;
  ForEach(parallel, CeilDiv(n_queries, kHeadTile), [&](size_t task) {
    for (size_t query = task * kHeadTile; query < std::min(n_queries, (task + 1) * kHeadTile); ++query) {
      Start(states + query, acc + query * value_dim, 1, value_dim);
      for (size_t split = 0; split < splits.most; ++split) {
        const size_t from = (query / heads * splits.most + split) * heads + query % heads;
        Join(states + query, acc + query * value_dim, partial_states[from], partial.get() + from * value_dim, value_dim, k);
      }
    }
  });
}

}  // namespace mythos
