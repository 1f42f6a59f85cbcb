// Cases of the operators for tensorrt_plugins.cc, worked out in double. Included by it alone, inside its namespace.
//
// Shape letters as in runtimes/native/tensorrt/operators.h.
constexpr double kEpsilon = 1e-6;
double tolerance(DataType type) { return type == DataType::kFLOAT ? 1e-5 : type == DataType::kHALF ? 4e-3 : 3e-2; }

Doubles normed(const double* x, const Tensor& norm) {
  const int64_t n = norm.size();
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
  Doubles y(n);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] / std::sqrt(squares / n + kEpsilon) * norm.values[i];
  return y;
}

// Row o of a matrix with so many columns, times x.
double product(const double* matrix, int64_t row, const double* x, int64_t columns) {
  return std::inner_product(x, x + columns, matrix + row * columns, 0.0);
}

// down . (silu(gate . x) * (up . x))
Doubles expert(const double* gate_up, const double* down, const Doubles& x, int64_t hidden) {
  const int64_t dim = int64_t(x.size());
  Doubles inner(hidden), y(dim);
  for (int64_t f = 0; f < hidden; ++f) {
    const double gate = product(gate_up, f, x.data(), dim), up = product(gate_up, hidden + f, x.data(), dim);
    inner[f] = gate / (1 + std::exp(-gate)) * up;
  }
  for (int64_t d = 0; d < dim; ++d) y[d] = product(down, d, inner.data(), hidden);
  return y;
}

Case normalized_linear(int64_t batch, int64_t seq, DataType type) {
  const int64_t in = 64, out = 40;
  const Tensor x = floats({batch, seq, in}), norm = floats({in}, 0.1, 1), weight = numbers(type, {out, in}, 0.2);
  Tensor y{DataType::kFLOAT, {batch, seq, out}, {}};
  for (int64_t t = 0; t < batch * seq; ++t) {
    const Doubles row = normed(&x.values[t * in], norm);
    for (int64_t o = 0; o < out; ++o) y.values.push_back(product(weight.values.data(), o, row.data(), in));
  }
  return {"NormalizedLinear", {{"epsilon", true, kEpsilon}}, {x, norm, weight}, {y}, tolerance(type)};
}

Case residual_linear(int64_t batch, int64_t seq, DataType type) {
  const int64_t in = 48, out = 64;
  const Tensor residual = floats({batch, seq, out}), x = floats({batch, seq, in}), weight = numbers(type, {out, in}, 0.2);
  Tensor y{DataType::kFLOAT, {batch, seq, out}, {}};
  for (int64_t t = 0; t < batch * seq; ++t) {
    for (int64_t o = 0; o < out; ++o) y.values.push_back(residual.values[t * out + o] + product(weight.values.data(), o, &x.values[t * in], in));
  }
  return {"ResidualLinear", {}, {residual, x, weight}, {y}, tolerance(type)};
}

Case feed_forward(int64_t batch, int64_t seq, DataType type) {
  const int64_t dim = 64, hidden = 96;
  const Tensor x = floats({batch, seq, dim}), norm = floats({dim}, 0.1, 1), gate_up = numbers(type, {2 * hidden, dim}, 0.2),
               down = numbers(type, {dim, hidden}, 0.2);
  Tensor y{DataType::kFLOAT, x.shape, x.values};
  for (int64_t t = 0; t < batch * seq; ++t) {
    const Doubles one = expert(gate_up.values.data(), down.values.data(), normed(&x.values[t * dim], norm), hidden);
    for (int64_t d = 0; d < dim; ++d) y.values[t * dim + d] += one[d];
  }
  return {"FeedForward", {{"epsilon", true, kEpsilon}}, {x, norm, gate_up, down}, {y}, tolerance(type)};
}

// Softmax over the chosen, no groups: the routing itself is tested with the kernels.
Case mixture_of_experts(int64_t batch, int64_t seq, DataType type, int64_t shared) {
  const int64_t dim = 64, hidden = 32, routed = 8, top_k = 2;
  const Tensor x = floats({batch, seq, dim}), norm = floats({dim}, 0.1, 1), router = floats({routed, dim}, 0.3), bias = floats({routed}, 0.1),
               gate_up = numbers(type, {routed + shared, 2 * hidden, dim}, 0.2), down = numbers(type, {routed + shared, dim, hidden}, 0.2);
  Tensor y{DataType::kFLOAT, x.shape, x.values};
  for (int64_t t = 0; t < batch * seq; ++t) {
    const Doubles row = normed(&x.values[t * dim], norm);
    std::vector<int64_t> order(routed);
    std::iota(order.begin(), order.end(), 0);
    Doubles logits(routed);
    for (int64_t e = 0; e < routed; ++e) logits[e] = product(router.values.data(), e, row.data(), dim);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[a] + bias.values[a] > logits[b] + bias.values[b]; });
    double sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += std::exp(logits[order[k]]);
    for (int64_t k = 0; k < top_k + shared; ++k) {
      const int64_t e = k < top_k ? order[k] : routed + k - top_k;
      const double weight = k < top_k ? std::exp(logits[e]) / sum : 1;
      const Doubles one = expert(&gate_up.values[e * 2 * hidden * dim], &down.values[e * dim * hidden], row, hidden);
      for (int64_t d = 0; d < dim; ++d) y.values[t * dim + d] += weight * one[d];
    }
  }
  const std::vector<Attribute> attributes = {{"top_k", false, double(top_k)}, {"epsilon", true, kEpsilon}, {"scoring", false, 0},
                                             {"normalized", false, 1},        {"scale", true, 1},          {"n_groups", false, 1},
                                             {"top_k_groups", false, 1},      {"group_top_k", false, 1}};
  return {"MixtureOfExperts", attributes, {x, norm, router, bias, gate_up, down}, {y}, tolerance(type)};
}

// Halves of a head rotated by the angles of a token.
Doubles rotated(const double* x, const Tensor& cos, const Tensor& sin, int64_t token) {
  const int64_t half = cos.shape[2];
  Doubles y(2 * half);
  for (int64_t i = 0; i < half; ++i) {
    const double c = cos.values[token * half + i], s = sin.values[token * half + i];
    y[i] = x[i] * c - x[half + i] * s, y[half + i] = x[half + i] * c + x[i] * s;
  }
  return y;
}

// Softmax-weighted rows: keys of width key at row + keys_at, values at row + values_at, rows from first to last.
Doubles attended(const Doubles& query, const std::vector<const double*>& all, int64_t first, int64_t keys_at, int64_t values_at, int64_t value,
                 double scale) {
  Doubles scores, y(value);
  double sum = 0, most = -INFINITY;
  for (size_t r = first; r < all.size(); ++r) {
    scores.push_back(scale * std::inner_product(query.begin(), query.end(), all[r] + keys_at, 0.0));
    most = std::max(most, scores.back());
  }
  for (double& score : scores) sum += score = std::exp(score - most);
  for (size_t r = first; r < all.size(); ++r) {
    for (int64_t i = 0; i < value; ++i) y[i] += scores[r - first] / sum * all[r][values_at + i];
  }
  return y;
}

// The rows that token s of sequence b sees: those cached, then the new ones up to its own.
std::vector<const double*> seen(const Tensor& past, const Tensor& length, const Tensor& fresh, int64_t b, int64_t s) {
  const int64_t capacity = past.shape[1], width = past.shape[2], seq = fresh.shape[1], n = int64_t(length.values[b]);
  std::vector<const double*> all;
  for (int64_t r = std::max<int64_t>(0, n - capacity); r < n; ++r) all.push_back(&past.values[(b * capacity + r % capacity) * width]);
  for (int64_t r = 0; r <= s; ++r) all.push_back(&fresh.values[(b * seq + r) * width]);
  return all;
}

// Rows as a cache stores them.
Tensor cached(DataType type, std::vector<int64_t> shape, const Doubles& values) {
  Tensor tensor{type, std::move(shape), {}};
  char stored[8];
  for (const double value : values) {
    store(type, value, stored);
    tensor.values.push_back(load(type, stored));
  }
  return tensor;
}

Case latent_attention(int64_t batch, int64_t seq, DataType type, DataType cache) {
  const int64_t heads = 4, nope = 16, rope = 8, rank = 32, v = 16, capacity = 64, width = rank + rope;
  const double scale = 0.2;
  const Tensor q = floats({batch, seq, heads * (nope + rope)}), kv = floats({batch, seq, width}), norm = floats({rank}, 0.1, 1),
               w_uk = numbers(type, {heads, rank, nope}, 0.25), w_uv = numbers(type, {heads, v, rank}, 0.2),
               cos = floats({batch, seq, rope / 2}), sin = floats({batch, seq, rope / 2}), past = numbers(cache, {batch, capacity, width});
  Doubles lengths;
  for (int64_t b = 0; b < batch; ++b) lengths.push_back(double((b * 23 + 5) % (capacity - seq)));
  const Tensor length = integers({batch}, lengths);
  Doubles rows;
  for (int64_t t = 0; t < batch * seq; ++t) {
    const Doubles latent = normed(&kv.values[t * width], norm), key = rotated(&kv.values[t * width + rank], cos, sin, t);
    rows.insert(rows.end(), latent.begin(), latent.end()), rows.insert(rows.end(), key.begin(), key.end());
  }
  const Tensor fresh = cached(cache, {batch, seq, width}, rows);
  Tensor y{DataType::kFLOAT, {batch, seq, heads * v}, {}};
  for (int64_t t = 0; t < batch * seq; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const double* head = &q.values[(t * heads + h) * (nope + rope)];
      Doubles query(rank);
      for (int64_t r = 0; r < rank; ++r) query[r] = product(&w_uk.values[h * rank * nope], r, head, nope);
      const Doubles turned = rotated(head + nope, cos, sin, t);
      query.insert(query.end(), turned.begin(), turned.end());
      const Doubles mixed = attended(query, seen(past, length, fresh, t / seq, t % seq), 0, 0, 0, rank, scale);
      for (int64_t i = 0; i < v; ++i) y.values.push_back(product(&w_uv.values[h * v * rank], i, mixed.data(), rank));
    }
  }
  return {"LatentAttention", {{"scale", true, scale}, {"epsilon", true, kEpsilon}}, {q, kv, norm, w_uk, w_uv, cos, sin, past, length}, {y, fresh},
          2 * std::max(tolerance(type), tolerance(cache))};
}

Case grouped_query_attention(int64_t batch, int64_t seq, DataType cache, int64_t window) {
  const int64_t heads = 4, groups = 2, dim = 32, capacity = 64, width = 2 * groups * dim;
  const double scale = 0.2;
  const Tensor qkv = floats({batch, seq, (heads + 2 * groups) * dim}), cos = floats({batch, seq, dim / 2}), sin = floats({batch, seq, dim / 2}),
               past = numbers(cache, {batch, capacity, width});
  Doubles lengths;
  for (int64_t b = 0; b < batch; ++b) lengths.push_back(double((b * 23 + 5) % (capacity - seq)) + (window > 0 ? 2 * capacity : 0));
  const Tensor length = integers({batch}, lengths);
  Doubles rows;
  for (int64_t t = 0; t < batch * seq; ++t) {
    const double* all = &qkv.values[t * (heads + 2 * groups) * dim];
    for (int64_t g = 0; g < groups; ++g) {
      const Doubles key = rotated(all + (heads + g) * dim, cos, sin, t);
      rows.insert(rows.end(), key.begin(), key.end());
    }
    rows.insert(rows.end(), all + (heads + groups) * dim, all + (heads + 2 * groups) * dim);
  }
  const Tensor fresh = cached(cache, {batch, seq, width}, rows);
  Tensor y{DataType::kFLOAT, {batch, seq, heads * dim}, {}};
  for (int64_t t = 0; t < batch * seq; ++t) {
    const auto all = seen(past, length, fresh, t / seq, t % seq);
    const int64_t first = window > 0 ? std::max<int64_t>(0, int64_t(all.size()) - window) : 0;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t g = h / (heads / groups);
      const Doubles query = rotated(&qkv.values[(t * (heads + 2 * groups) + h) * dim], cos, sin, t);
      const Doubles one = attended(query, all, first, g * dim, (groups + g) * dim, dim, scale);
      y.values.insert(y.values.end(), one.begin(), one.end());
    }
  }
  const std::vector<Attribute> attributes = {
      {"n_heads", false, double(heads)}, {"n_kv_heads", false, double(groups)}, {"window", false, double(window)}, {"scale", true, scale}};
  return {"GroupedQueryAttention", attributes, {qkv, cos, sin, past, length}, {y, fresh}, 2 * tolerance(cache)};
}

Case recurrent_input(int64_t batch, int64_t seq) {
  const int64_t dim = 64;
  const Tensor h = floats({batch, seq, dim}), e = floats({batch, seq, dim}), signal = floats({dim}), norm = floats({dim}, 0.1, 1);
  Tensor y{DataType::kFLOAT, h.shape, {}};
  for (int64_t t = 0; t < batch * seq; ++t) {
    Doubles sum(dim);
    for (int64_t d = 0; d < dim; ++d) sum[d] = h.values[t * dim + d] + e.values[t * dim + d] + signal.values[d];
    const Doubles row = normed(sum.data(), norm);
    y.values.insert(y.values.end(), row.begin(), row.end());
  }
  return {"RecurrentInput", {{"epsilon", true, kEpsilon}}, {h, e, signal, norm}, {y}, 1e-5};
}

Case recurrent_update(int64_t batch, int64_t seq, bool of_each) {
  const int64_t dim = 64, rank = 3, tokens = batch * seq;
  const double threshold = 0.99, halt_bias = 0.1;
  const Tensor x = floats({batch, seq, dim}), h = floats({batch, seq, dim}), e = floats({batch, seq, dim}), result = floats({batch, seq, dim}),
               mass = floats({batch, seq, 1}, 0.3, 0.7), lora_down = floats({rank, dim}, 0.2), lora_scale = floats({rank}),
               lora_up = floats({rank, dim}), decay = floats({dim}), injection = floats({dim}), halt = floats({dim}, 0.1);
  Doubles exits, left;
  for (int64_t t = 0; t < tokens; ++t) exits.push_back(double(t % 5));
  for (int64_t b = 0; b < (of_each ? batch : 1); ++b) left.push_back(double(1 - b % 2));  // every second sequence is at its depth
  const Tensor exit_loop = integers({batch, seq, 1}, exits), loops_left = integers({int64_t(left.size())}, left);
  Tensor next_h{DataType::kFLOAT, h.shape, {}}, next_result{DataType::kFLOAT, h.shape, {}}, next_mass{DataType::kFLOAT, mass.shape, {}};
  Tensor next_exit{DataType::kINT64, exit_loop.shape, {}};
  for (int64_t t = 0; t < tokens; ++t) {
    double logit = halt_bias;
    for (int64_t d = 0; d < dim; ++d) {
      double next = decay.values[d] * h.values[t * dim + d] + injection.values[d] * e.values[t * dim + d] + x.values[t * dim + d];
      for (int64_t r = 0; r < rank; ++r) {
        next += product(lora_down.values.data(), r, &x.values[t * dim], dim) * lora_scale.values[r] * lora_up.values[r * dim + d];
      }
      next_h.values.push_back(next), logit += next * halt.values[d];
    }
    const double before = mass.values[t], probability = 1 / (1 + std::exp(-logit)), after = before + probability;
    const bool runs = before < threshold && left[of_each ? t / seq : 0] > 0;
    const double weight = after >= threshold ? std::max(1 - before, 0.0) : probability;
    for (int64_t d = 0; d < dim; ++d) next_result.values.push_back(result.values[t * dim + d] + (runs ? weight * next_h.values[t * dim + d] : 0));
    next_mass.values.push_back(runs ? after : before), next_exit.values.push_back(exits[t] + runs);
  }
  return {"RecurrentUpdate",
          {{"act_threshold", true, threshold}, {"halt_bias", true, halt_bias}},
          {x, h, e, result, mass, exit_loop, loops_left, lora_down, lora_scale, lora_up, decay, injection, halt},
          {next_h, next_result, next_mass, next_exit},
          1e-5};
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto& [batch, seq] : {std::pair<int64_t, int64_t>{1, 1}, {3, 1}, {2, 20}}) {
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
      all.push_back(normalized_linear(batch, seq, type));
      all.push_back(residual_linear(batch, seq, type));
      all.push_back(feed_forward(batch, seq, type));
      for (const int64_t shared : {0, 2}) all.push_back(mixture_of_experts(batch, seq, type, shared));
      all.push_back(latent_attention(batch, seq, type, type));
      all.push_back(latent_attention(batch, seq, DataType::kFLOAT, type));
      for (const int64_t window : {0, 24}) all.push_back(grouped_query_attention(batch, seq, type, window));
    }
    all.push_back(recurrent_input(batch, seq));
    for (const bool of_each : {false, true}) all.push_back(recurrent_update(batch, seq, of_each));
  }
  return all;
}
