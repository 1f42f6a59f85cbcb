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

// One block of rows of one group as floats: where they lie, or widened into a buffer.
struct Block {
  const float *keys, *values;
  size_t stride;
};

Block Widened(const Queries& q, const Rows& rows, size_t group, size_t first, size_t n, float* buffer, const Kernels& k) {
  const size_t keys_at = rows.keys_at + group * rows.step, values_at = rows.values_at + group * rows.step;
  if (rows.type == CacheType::kFloat32) {
    const float* from = reinterpret_cast<const float*>(rows.row(first));
    return {from + keys_at, from + values_at, rows.width};
  }
  const size_t size = SizeOf(rows.type);
  const bool inside = values_at == keys_at;  // the values are the keys' first channels
  const size_t stride = inside ? q.key_dim : q.key_dim + q.value_dim;
  for (size_t r = 0; r < n; ++r) {
    const char* row = rows.row(first + r);
    const float scale = rows.scales == nullptr ? 1.0f : rows.scales[first + r];
    k.widen(rows.type, row + keys_at * size, q.key_dim, scale, buffer + r * stride);
    if (!inside) k.widen(rows.type, row + values_at * size, q.value_dim, scale, buffer + r * stride + q.key_dim);
  }
  return {buffer, inside ? buffer : buffer + q.key_dim, stride};
}

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

}  // namespace

void Attend(const Queries& q, const Rows& rows, const Kernels& k) {
  constexpr size_t kPiece = 4;  // rows between two requests for later ones
  const size_t end = std::min(rows.count, *std::max_element(q.to, q.to + q.m)), step = RowsAStep(q, rows);
  const bool widen = rows.type != CacheType::kFloat32;
  Scratch scratch(q.m * kRowBlock + (widen ? kRowBlock * (q.key_dim + q.value_dim) : 0));
  float* scores = scratch.get();
  for (size_t start = *std::min_element(q.from, q.from + q.m) / step * step; start < end; start += step) {
    const size_t n = std::min(step, end - start), next = start + n, piece = q.groups == 1 ? n : kPiece;
    Ahead ahead(rows, next, q.groups == 1 ? 0 : std::min(step, end - next), q.groups * 2 * CeilDiv(n, piece));
    for (size_t group = 0; group < q.groups; ++group) {
      const Block block = Widened(q, rows, group, start, n, scores + q.m * kRowBlock, k);
      const float* queries = q.values + group * q.m * q.key_dim;
      for (size_t r = 0; r < n; r += piece) {
        ahead.Ask();
        k.matmul_nt(queries, q.key_dim, q.m, block.keys + r * block.stride, block.stride, std::min(piece, n - r), q.key_dim,
                    scores + r, kRowBlock);
      }
      Weigh(q, group, start, n, scores, k);
      float* acc = q.acc + group * q.m * q.value_dim;
      for (size_t r = 0; r < n; r += piece) {
        ahead.Ask();
        k.matmul_nn(scores + r, kRowBlock, q.m, block.values + r * block.stride, block.stride, std::min(piece, n - r), q.value_dim,
                    acc, q.value_dim);
      }
    }
  }
}

Cut::Cut(size_t seq, size_t n_heads)
    : tokens(seq == 1 ? 1 : std::min(seq, kTokenTile)),
      heads(seq == 1 ? std::min(n_heads, kHeadTile) : 1),
      token_tiles(CeilDiv(seq, tokens)),
      head_tiles(CeilDiv(n_heads, heads)) {}

Splits::Splits(size_t seq, size_t batch, const int64_t* past_len) : rows(0), most(0) {
  constexpr size_t kLong = 256, kFewest = 128, kMost = 1024, kAimedAt = 8;
  const size_t longest = static_cast<size_t>(*std::max_element(past_len, past_len + batch));
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

void AttendSplits(const Splits& splits, const DecodeShape& shape, const float* queries, const std::function<Rows(size_t)>& rows_of,
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
    const Rows rows = rows_of(b);
    const size_t visible = first_of(b), n = first >= rows.count ? 0 : std::min(splits.rows, rows.count - first);
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
