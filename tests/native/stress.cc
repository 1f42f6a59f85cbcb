// Random shapes through every operator and instruction set on two threads, each compared with the scalar kernels. Built with
// sanitizers, and for aarch64, by tests/test_native.py. Dead cache rows hold NaN, so a result that reads one is not finite.
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

  void Check(const char* name) const {
    for (size_t i = 0; i < scalar.size(); ++i)
      if (!std::isfinite(tested[i]) || std::abs(tested[i] - scalar[i]) > 1e-3f * (1.0f + std::abs(scalar[i]))) {
        std::printf("%s: element %zu is %g, with scalar code %g\n", name, i, tested[i], scalar[i]);
        std::exit(1);
      }
  }
};

struct Tables {
  const mythos::Kernels& scalar;
  const mythos::Kernels& tested;
};

// Two threads, tasks in turn.
void RunOnTwo(void*, void (*task)(void*, size_t), size_t n, void* data) {
  std::thread even([&] {
    for (size_t i = 0; i < n; i += 2) task(data, i);
  });
  for (size_t i = 1; i < n; i += 2) task(data, i);
  even.join();
}
const mythos::Parallel kTwoThreads{nullptr, RunOnTwo};

// Lengths of a ragged batch, and NaN in every row [capacity][width] past them.
std::vector<int64_t> Ragged(size_t batch, size_t capacity, size_t width, std::vector<float>* past) {
  std::vector<int64_t> lengths;
  for (size_t b = 0; b < batch; ++b) {
    const size_t length = Between(0, capacity);
    lengths.push_back(static_cast<int64_t>(length));
    for (size_t i = length * width; i < capacity * width; ++i)
      (*past)[b * capacity * width + i] = std::numeric_limits<float>::quiet_NaN();
  }
  return lengths;
}

void StressMixture(const Tables& tables) {
  mythos::MixtureOfExpertsArgs a{};
  a.tokens = Between(1, 70), a.dim = Between(1, 50), a.n_experts = Between(1, 20), a.expert_dim = Between(1, 60);
  a.top_k = Between(1, a.n_experts);
  const auto x = Floats(a.tokens * a.dim), router = Floats(a.dim * a.n_experts), bias = Floats(a.n_experts);
  const auto gate_up = Floats(a.n_experts * 2 * a.expert_dim * a.dim), down = Floats(a.n_experts * a.dim * a.expert_dim);
  Both y(a.tokens * a.dim);
  a.x = x.data(), a.router = router.data(), a.router_bias = bias.data();
  a.gate_up = gate_up.data(), a.down = down.data();
  a.y = y.scalar.data();
  mythos::MixtureOfExperts(a, tables.scalar, kTwoThreads);
  a.y = y.tested.data();
  mythos::MixtureOfExperts(a, tables.tested, kTwoThreads);
  y.Check("MixtureOfExperts");
}

void StressLatentAttention(const Tables& tables) {
  mythos::LatentAttentionArgs a{};
  a.batch = Between(1, 3), a.seq = Between(0, 2) ? Between(1, 40) : 1, a.n_heads = Between(1, 9), a.nope = Between(1, 20);
  a.rope = 2 * Between(1, 9), a.v_head_dim = Between(1, 20), a.rank = Between(1, 40), a.capacity = Between(1, 150);
  a.scale = 0.1f, a.epsilon = 1e-6f;
  const size_t tokens = a.batch * a.seq, width = a.rank + a.rope;
  const auto q = Floats(tokens * a.n_heads * (a.nope + a.rope)), kv = Floats(tokens * width), norm = Floats(a.rank);
  const auto w_uk = Floats(a.n_heads * a.nope * a.rank), w_uv = Floats(a.n_heads * a.v_head_dim * a.rank);
  const auto cos = Floats(tokens * a.rope / 2), sin = Floats(tokens * a.rope / 2);
  auto past = Floats(a.batch * a.capacity * width);
  const auto lengths = Ragged(a.batch, a.capacity, width, &past);
  Both y(tokens * a.n_heads * a.v_head_dim), new_kv(tokens * width);
  a.q = q.data(), a.kv = kv.data(), a.kv_norm = norm.data(), a.w_uk = w_uk.data(), a.w_uv = w_uv.data();
  a.cos = cos.data(), a.sin = sin.data(), a.past = past.data(), a.past_len = lengths.data();
  a.y = y.scalar.data(), a.new_kv = new_kv.scalar.data();
  mythos::LatentAttention(a, tables.scalar, kTwoThreads);
  a.y = y.tested.data(), a.new_kv = new_kv.tested.data();
  mythos::LatentAttention(a, tables.tested, kTwoThreads);
  y.Check("LatentAttention");
  new_kv.Check("LatentAttention, new_kv");
}

void StressGroupedQueryAttention(const Tables& tables) {
  mythos::GroupedQueryAttentionArgs a{};
  a.batch = Between(1, 3), a.seq = Between(0, 2) ? Between(1, 40) : 1, a.n_kv_heads = Between(1, 4);
  a.n_heads = a.n_kv_heads * Between(1, 9), a.head_dim = 2 * Between(1, 20), a.capacity = Between(1, 150);
  a.scale = 0.1f;
  const size_t tokens = a.batch * a.seq, width = 2 * a.n_kv_heads * a.head_dim;
  const auto qkv = Floats(tokens * (a.n_heads + 2 * a.n_kv_heads) * a.head_dim);
  const auto cos = Floats(tokens * a.head_dim / 2), sin = Floats(tokens * a.head_dim / 2);
  auto past = Floats(a.batch * a.capacity * width);
  const auto lengths = Ragged(a.batch, a.capacity, width, &past);
  Both y(tokens * a.n_heads * a.head_dim), new_kv(tokens * width);
  a.qkv = qkv.data(), a.cos = cos.data(), a.sin = sin.data(), a.past = past.data(), a.past_len = lengths.data();
  a.y = y.scalar.data(), a.new_kv = new_kv.scalar.data();
  mythos::GroupedQueryAttention(a, tables.scalar, kTwoThreads);
  a.y = y.tested.data(), a.new_kv = new_kv.tested.data();
  mythos::GroupedQueryAttention(a, tables.tested, kTwoThreads);
  y.Check("GroupedQueryAttention");
  new_kv.Check("GroupedQueryAttention, new_kv");
}

}  // namespace

int main() {
  mythos::UseKernels("scalar");
  const mythos::Kernels& scalar = mythos::CurrentKernels();
  for (const char* name : {"scalar", "avx2", "avx512", "neon"}) {
    if (!mythos::UseKernels(name)) continue;
    const Tables tables{scalar, mythos::CurrentKernels()};
    for (int round = 0; round < 60; ++round) {
      StressMixture(tables);
      StressLatentAttention(tables);
      StressGroupedQueryAttention(tables);
    }
    std::printf("%s ok\n", name);
  }
}
