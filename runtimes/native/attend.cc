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

}  // namespace

void NewRows::Store(size_t t, float* row, size_t width, const Kernels& k) const {
  if (type == CacheType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + t * width, row, width * sizeof(float));
    return;
  }
  char* to = static_cast<char*>(data) + t * width * SizeOf(type);
  float scale = 1.0f;
  if (type == CacheType::kInt8) {
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

// One block of rows as floats: where they lie, or widened into a buffer.
struct Block {
  const float *keys, *values;
  size_t stride;
};

Block Widened(const Queries& q, const Rows& rows, size_t first, size_t n, float* buffer, const Kernels& k) {
  if (rows.type == CacheType::kFloat32) {
    const float* from = reinterpret_cast<const float*>(rows.row(first));
    return {from + rows.keys_at, from + rows.values_at, rows.width};
  }
  const size_t size = SizeOf(rows.type);
  const bool inside = rows.values_at == rows.keys_at;  // the values are the keys' first channels
  const size_t stride = inside ? q.key_dim : q.key_dim + q.value_dim;
  for (size_t r = 0; r < n; ++r) {
    const char* row = rows.row(first + r);
    const float scale = rows.scales == nullptr ? 1.0f : rows.scales[first + r];
    k.widen(rows.type, row + rows.keys_at * size, q.key_dim, scale, buffer + r * stride);
    if (!inside) k.widen(rows.type, row + rows.values_at * size, q.value_dim, scale, buffer + r * stride + q.key_dim);
  }
  return {buffer, inside ? buffer : buffer + q.key_dim, stride};
}

}  // namespace

void Attend(const Queries& q, const Rows& rows, const Kernels& k) {
  const size_t end = std::min(rows.count, *std::max_element(q.to, q.to + q.m));
  const bool widen = rows.type != CacheType::kFloat32;
  Scratch scratch(q.m * kRowBlock + (widen ? kRowBlock * (q.key_dim + q.value_dim) : 0));
  float* scores = scratch.get();
  for (size_t start = *std::min_element(q.from, q.from + q.m) / kRowBlock * kRowBlock; start < end; start += kRowBlock) {
    const size_t n = std::min(kRowBlock, end - start);
    const Block block = Widened(q, rows, start, n, scores + q.m * kRowBlock, k);
    k.matmul_nt(q.values, q.key_dim, q.m, block.keys, block.stride, n, q.key_dim, scores, kRowBlock);
    for (size_t i = 0; i < q.m; ++i) {
      float* row = scores + i * kRowBlock;
      const size_t to = std::min(n, q.to[i] <= start ? 0 : q.to[i] - start);
      const size_t from = std::min(to, q.from[i] <= start ? 0 : q.from[i] - start);
      if (from < to) {
        const float correction = k.online_softmax(row + from, to - from, &q.state[i]);
        if (correction != 1.0f) k.scale(q.acc + i * q.value_dim, correction, q.value_dim);
      }
      std::fill(row, row + from, 0.0f);
      std::fill(row + to, row + n, 0.0f);
    }
    k.matmul_nn(scores, kRowBlock, q.m, block.values, block.stride, n, q.value_dim, q.acc, q.value_dim);
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

void AttendSplits(const Splits& splits, size_t units, size_t m, size_t key_dim, size_t value_dim, const float* queries,
                  const std::function<Rows(size_t)>& rows_of, const std::function<size_t(size_t)>& first_of,
                  SoftmaxRow* states, float* acc, const Kernels& k, const Parallel& parallel) {
  const size_t tasks = units * splits.most;
  Scratch partial(tasks * m * value_dim);
  std::vector<SoftmaxRow> partial_states(tasks * m);
  ForEach(parallel, tasks, [&](size_t task) {
    const size_t unit = task / splits.most, first = task % splits.most * splits.rows;
    float* to = partial.get() + task * m * value_dim;
    SoftmaxRow* state = partial_states.data() + task * m;
    Start(state, to, m, value_dim);
    const Rows rows = rows_of(unit);
    const size_t visible = first_of(unit), n = first >= rows.count ? 0 : std::min(splits.rows, rows.count - first);
    if (n == 0 || visible >= first + n) return;
    const std::vector<size_t> from(m, visible <= first ? 0 : visible - first), end(m, n);
    Attend({queries + unit * m * key_dim, m, key_dim, value_dim, from.data(), end.data(), to, state}, rows.From(first, n), k);
  });
  ForEach(parallel, CeilDiv(units * m, kHeadTile), [&](size_t task) {
    for (size_t query = task * kHeadTile; query < std::min(units * m, (task + 1) * kHeadTile); ++query) {
      Start(states + query, acc + query * value_dim, 1, value_dim);
      for (size_t split = 0; split < splits.most; ++split) {
        const size_t from = (query / m * splits.most + split) * m + query % m;
        Join(states + query, acc + query * value_dim, partial_states[from], partial.get() + from * value_dim, value_dim, k);
      }
    }
  });
}

}  // namespace mythos
