// Random shapes through every operator and instruction set on two threads, each compared with the scalar kernels. Built with
// sanitizers, and for aarch64, by tests/test_native.py. Dead cache rows hold NaN, so a result that reads one is not finite.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "operators.h"

namespace {

std::mt19937 random_engine(1);

size_t Between(size_t low, size_t high) { return std::uniform_int_distribution<size_t>(low, high)(random_engine); }

std::vector<float> Floats(size_t n) {
  std::uniform_real_distribution<float> distribution(-1.0f, 1.0f);
  std::vector<float> values(n);
  for (float& value : values) value = distribution(random_engine);
  return values;
}

// Results of the scalar kernels and of those under test.
struct Both {
  std::vector<float> scalar, tested;
  explicit Both(size_t n) : scalar(n), tested(n) {}

  // rounds: results may be off by a level of 8 bits where a float's last bit decided it.
  void Check(const char* name, bool rounds) const {
    float largest = 0.0f;
    for (const float value : scalar) largest = std::max(largest, std::abs(value));
    const float allowed = rounds ? 0.05f * largest : 1e-3f * (1.0f + largest);
    for (size_t i = 0; i < scalar.size(); ++i)
      if (!std::isfinite(tested[i]) || std::abs(tested[i] - scalar[i]) > allowed) {
        std::printf("%s: element %zu is %g, with scalar code %g\n", name, i, tested[i], scalar[i]);
        std::exit(1);
      }
  }
};

struct Tables {
  const mythos::Kernels& scalar;
  const mythos::Kernels& tested;
};

// Runs an operator with both tables: run(kernels, where results go).
template <typename Run>
void Compare(const Tables& tables, const char* name, size_t n, bool rounds, const Run& run) {
  Both y(n);
  run(tables.scalar, y.scalar.data());
  run(tables.tested, y.tested.data());
  y.Check(name, rounds);
}

// Two threads, tasks in turn.
void RunOnTwo(void*, void (*task)(void*, size_t), size_t n, void* data) {
  std::thread even([&] {
    for (size_t i = 0; i < n; i += 2) task(data, i);
  });
  for (size_t i = 1; i < n; i += 2) task(data, i);
  even.join();
}
const mythos::Parallel kTwoThreads{nullptr, RunOnTwo};

// Random matrices [stack][n][k] of a random stored type; the memory ends where the numbers do. Their input is rounded to a random
// type, with static scales or without.
class Weights {
 public:
  Weights(size_t stack, size_t n, size_t k) {
    const size_t numbers = stack * n * k;
    matrix_.n = n, matrix_.k = k, matrix_.block = size_t{32} << Between(0, 2);
    using Type = mythos::WeightType;
    matrix_.type = std::array{Type::kFloat32, Type::kInt8, Type::kInt4, Type::kFloat8}[Between(0, 3)];
    const bool four = matrix_.type == mythos::WeightType::kInt4;
    if (matrix_.type == mythos::WeightType::kFloat32 || (four && k % 2 == 1)) {
      matrix_.type = mythos::WeightType::kFloat32;
      floats_ = Floats(numbers);
      matrix_.values = floats_.data();
      return;
    }
    matrix_.activation_type = Between(0, 3) > 0 ? mythos::ActivationType::kInt8 : static_cast<mythos::ActivationType>(Between(0, 2));
    if (matrix_.activation_type == mythos::ActivationType::kFloat8 || Between(0, 1) == 1)
      matrix_.activation_scale = 0.002f * static_cast<float>(Between(1, 8));
    bytes_.resize(four ? numbers / 2 : numbers);
    for (uint8_t& byte : bytes_) byte = static_cast<uint8_t>(Between(0, 255));
    if (matrix_.type == mythos::WeightType::kFloat8)
      for (uint8_t& byte : bytes_) byte &= 0xB7;  // below 1 in size, so none is NaN
    const size_t blocks = stack * n * ((k + matrix_.block - 1) / matrix_.block);
    matrix_.half_scales = Between(0, 1) == 1;
    for (size_t i = 0; i < blocks; ++i) halves_.push_back(static_cast<uint16_t>(Between(0x1000, 0x2000)));
    for (const uint16_t half : halves_) scales_.push_back(static_cast<float>(half) * 1e-6f);
    matrix_.values = bytes_.data();
    matrix_.scales = matrix_.half_scales ? static_cast<const void*>(halves_.data()) : scales_.data();
  }
  const mythos::Matrix& matrix() const { return matrix_; }
  bool rounds() const { return matrix_.rounds_to() != mythos::ActivationType::kFloat32; }

 private:
  mythos::Matrix matrix_;
  std::vector<float> floats_, scales_;
  std::vector<uint8_t> bytes_;
  std::vector<uint16_t> halves_;
};

void StressLinear(const Tables& tables) {
  const size_t tokens = Between(1, 40), n_in = Between(1, 200), n_out = Between(1, 70);
  const Weights w(1, n_out, n_in), down(1, n_in, n_out), gate_up(1, 2 * n_out, n_in);
  const auto x = Floats(tokens * n_in), norm = Floats(n_in), residual = Floats(tokens * n_out);
  Compare(tables, "NormalizedLinear", tokens * n_out, w.rounds(), [&](const mythos::Kernels& k, float* y) {
    mythos::NormalizedLinear({tokens, 1e-6f, x.data(), norm.data(), w.matrix(), y}, k, kTwoThreads);
  });
  Compare(tables, "ResidualLinear", tokens * n_out, w.rounds(), [&](const mythos::Kernels& k, float* y) {
    mythos::ResidualLinear({tokens, residual.data(), x.data(), w.matrix(), y}, k, kTwoThreads);
  });
  const bool rounds = gate_up.rounds() || down.rounds();
  Compare(tables, "FeedForward", tokens * n_in, rounds, [&](const mythos::Kernels& k, float* y) {
    mythos::FeedForward({tokens, 1e-6f, x.data(), norm.data(), gate_up.matrix(), down.matrix(), y}, k, kTwoThreads);
  });
}

void StressMixture(const Tables& tables) {
  mythos::MixtureOfExpertsArgs a{};
  a.tokens = Between(1, 70), a.n_routed = Between(1, 12), a.n_shared = Between(0, 2);
  a.routing.n_groups = Between(0, 1) == 1 ? Between(1, 3) : 1;
  a.n_routed *= a.routing.n_groups;
  const size_t group = a.n_routed / a.routing.n_groups;
  a.routing.top_k_groups = Between(1, a.routing.n_groups), a.routing.group_top_k = Between(1, std::min<size_t>(2, group));
  a.routing.top_k = Between(1, a.routing.top_k_groups * group);
  a.routing.sigmoid = Between(0, 1) == 1, a.routing.normalized = Between(0, 1) == 1, a.routing.scale = 1.5f;
  const size_t dim = Between(1, 50), hidden = Between(1, 60), experts = a.n_routed + a.n_shared;
  const auto x = Floats(a.tokens * dim), norm = Floats(dim), router = Floats(dim * a.n_routed), bias = Floats(a.n_routed);
  const Weights gate_up(experts, 2 * hidden, dim), down(experts, dim, hidden);
  a.x = x.data(), a.norm = norm.data(), a.router_bias = bias.data(), a.epsilon = 1e-6f;
  a.router.values = router.data(), a.router.n = a.n_routed, a.router.k = dim;
  a.gate_up = gate_up.matrix(), a.down = down.matrix();
  Compare(tables, "MixtureOfExperts", a.tokens * dim, gate_up.rounds() || down.rounds(), [&](const mythos::Kernels& k, float* y) {
    a.y = y;
    mythos::MixtureOfExperts(a, k, kTwoThreads);
  });
}

// A layer's cache of random type and lengths; dead rows hold NaN, or scales that are.
class RandomCache {
 public:
  // window: of attention; where the cache holds it, sequences may be longer than that.
  RandomCache(size_t batch, size_t seq, size_t capacity, size_t width, size_t window = 0) : batch_(batch), tokens_(batch * seq), width_(width) {
    type_ = static_cast<mythos::CacheType>(Between(0, 3));
    const size_t rows = batch * capacity;
    const auto numbers = Floats(rows * width);
    bytes_.resize(rows * width * mythos::SizeOf(type_));
    new_bytes_.resize(tokens_ * width * mythos::SizeOf(type_));
    scales_ = Floats(rows);
    new_scales_.resize(tokens_);
    mythos::NewRows all{type_, bytes_.data(), scales_.data(), 0.0f};
    for (size_t r = 0; r < rows; ++r) {
      std::vector<float> row(numbers.begin() + r * width, numbers.begin() + (r + 1) * width);
      all.Store(r, row.data(), width, mythos::CurrentKernels());
    }
    for (size_t b = 0; b < batch; ++b) {
      lengths.push_back(static_cast<int64_t>(Between(0, window > 0 && capacity + 1 >= window ? 3 * capacity : capacity)));
      for (size_t r = b * capacity + static_cast<size_t>(lengths[b]); r < (b + 1) * capacity; ++r) {
        std::vector<float> dead(width, std::numeric_limits<float>::quiet_NaN());
        all.Store(r, dead.data(), width, mythos::CurrentKernels());
      }
    }
  }
  mythos::Cache past() const { return {type_, bytes_.data(), scales_.data()}; }
  // Each row with a scale of its own, or all with one that cuts some numbers off.
  mythos::NewRows new_rows() { return {type_, new_bytes_.data(), new_scales_.data(), Between(0, 1) == 1 ? 0.005f : 0.0f}; }
  bool rounds() const { return type_ != mythos::CacheType::kFloat32; }
  std::vector<int64_t> lengths;

 private:
  mythos::CacheType type_;
  size_t batch_, tokens_, width_;
  std::vector<char> bytes_, new_bytes_;
  std::vector<float> scales_, new_scales_;
};

// Half of the time one new token over a cache that may be long, else several over a short one.
void Sizes(size_t* batch, size_t* seq, size_t* capacity) {
  const bool decode = Between(0, 1) == 1;
  *batch = Between(1, 3), *seq = decode ? 1 : Between(1, 40), *capacity = decode ? Between(1, 900) : Between(1, 150);
}

void StressLatentAttention(const Tables& tables) {
  mythos::LatentAttentionArgs a{};
  Sizes(&a.batch, &a.seq, &a.capacity);
  a.n_heads = Between(1, 9), a.nope = Between(1, 40), a.rope = 2 * Between(1, 9), a.v_head_dim = Between(1, 20);
  a.rank = Between(1, 90), a.scale = 0.1f, a.epsilon = 1e-6f;
  const size_t tokens = a.batch * a.seq, width = a.rank + a.rope;
  const auto q = Floats(tokens * a.n_heads * (a.nope + a.rope)), kv = Floats(tokens * width), norm = Floats(a.rank);
  const Weights w_uk(a.n_heads, a.rank, a.nope), w_uv(a.n_heads, a.v_head_dim, a.rank);
  const auto cos = Floats(tokens * a.rope / 2), sin = Floats(tokens * a.rope / 2);
  RandomCache cache(a.batch, a.seq, a.capacity, width);
  a.q = q.data(), a.kv = kv.data(), a.kv_norm = norm.data(), a.w_uk = w_uk.matrix(), a.w_uv = w_uv.matrix();
  a.cos = cos.data(), a.sin = sin.data(), a.past = cache.past(), a.past_len = cache.lengths.data(), a.new_kv = cache.new_rows();
  const bool rounds = w_uk.rounds() || w_uv.rounds() || cache.rounds();
  Compare(tables, "LatentAttention", tokens * a.n_heads * a.v_head_dim, rounds, [&](const mythos::Kernels& k, float* y) {
    a.y = y;
    mythos::LatentAttention(a, k, kTwoThreads);
  });
}

void StressGroupedQueryAttention(const Tables& tables) {
  mythos::GroupedQueryAttentionArgs a{};
  Sizes(&a.batch, &a.seq, &a.capacity);
  a.n_kv_heads = Between(1, 4), a.n_heads = a.n_kv_heads * Between(1, 9), a.head_dim = 2 * Between(1, 40);
  a.window = Between(0, 1) == 1 ? Between(1, 300) : 0, a.scale = 0.1f;
  const size_t tokens = a.batch * a.seq, width = 2 * a.n_kv_heads * a.head_dim;
  const auto qkv = Floats(tokens * (a.n_heads + 2 * a.n_kv_heads) * a.head_dim);
  const auto cos = Floats(tokens * a.head_dim / 2), sin = Floats(tokens * a.head_dim / 2);
  RandomCache cache(a.batch, a.seq, a.capacity, width, a.window);
  a.qkv = qkv.data(), a.cos = cos.data(), a.sin = sin.data();
  a.past = cache.past(), a.past_len = cache.lengths.data(), a.new_kv = cache.new_rows();
  Compare(tables, "GroupedQueryAttention", tokens * a.n_heads * a.head_dim, cache.rounds(), [&](const mythos::Kernels& k, float* y) {
    a.y = y;
    mythos::GroupedQueryAttention(a, k, kTwoThreads);
  });
}

void StressRecurrent(const Tables& tables) {
  const size_t batch = Between(1, 3), seq = Between(1, 30), dim = Between(1, 60), rank = Between(1, 9), tokens = batch * seq;
  const auto x = Floats(tokens * dim), h = Floats(tokens * dim), e = Floats(tokens * dim), result = Floats(tokens * dim);
  const auto mass = Floats(tokens), signal = Floats(dim), norm = Floats(dim), lora_down = Floats(rank * dim);
  const auto lora_scale = Floats(rank), lora_up = Floats(rank * dim), decay = Floats(dim), injection = Floats(dim), halt = Floats(dim);
  const std::vector<int64_t> exit_loop(tokens, 1), n_loops(batch, 3);
  Compare(tables, "RecurrentInput", tokens * dim, false, [&](const mythos::Kernels& k, float* y) {
    mythos::RecurrentInput({tokens, dim, 1e-6f, h.data(), e.data(), signal.data(), norm.data(), y}, k, kTwoThreads);
  });
  Compare(tables, "RecurrentUpdate", tokens * dim, false, [&](const mythos::Kernels& k, float* y) {
    mythos::RecurrentUpdateArgs a{};
    std::vector<float> next_h(tokens * dim), next_mass(tokens);
    std::vector<int64_t> next_exit(tokens);
    a.batch = batch, a.seq = seq, a.dim = dim, a.lora_rank = rank, a.act_threshold = 0.9f, a.loop = 2, a.n_loops_per_row = true;
    a.x = x.data(), a.h = h.data(), a.e = e.data(), a.result = result.data(), a.halted_mass = mass.data();
    a.exit_loop = exit_loop.data(), a.n_loops = n_loops.data(), a.lora_down = lora_down.data();
    a.lora_scale = lora_scale.data(), a.lora_up = lora_up.data(), a.decay = decay.data(), a.injection = injection.data();
    a.halt = halt.data(), a.halt_bias = 0.1f, a.next_h = next_h.data(), a.next_result = y;
    a.next_halted_mass = next_mass.data(), a.next_exit_loop = next_exit.data();
    mythos::RecurrentUpdate(a, k, kTwoThreads);
  });
}

}  // namespace

int main() {
  mythos::UseKernels("scalar");
  const mythos::Kernels& scalar = mythos::CurrentKernels();
  for (const char* name : {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_dotprod", "neon_i8mm"}) {
    if (!mythos::UseKernels(name)) continue;
    const Tables tables{scalar, mythos::CurrentKernels()};
    for (int round = 0; round < 60; ++round) {
      StressLinear(tables);
      StressMixture(tables);
      StressLatentAttention(tables);
      StressGroupedQueryAttention(tables);
      StressRecurrent(tables);
    }
    std::printf("%s ok\n", name);
  }
}
