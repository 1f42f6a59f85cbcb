// The CUDA kernel that draws tokens, on the host: a block of a few threads. Called by tests/test_choosing.py, and run under
// ThreadSanitizer as a program.
#include <pthread.h>

#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "choosing.cuh"

namespace {

using mythos::cuda::Run;

struct Shared {
  explicit Shared(int n) : runs(n), values(n), ids(n), flags(n) { pthread_barrier_init(&barrier, nullptr, n); }
  ~Shared() { pthread_barrier_destroy(&barrier); }
  pthread_barrier_t barrier;
  std::vector<Run> runs;
  std::vector<double> values;
  std::vector<int> ids, flags;
};

class HostThreads {
 public:
  HostThreads(Shared& shared, int index) : shared_(shared), index_(index) {}

  int index() const { return index_; }
  int count() const { return static_cast<int>(shared_.ids.size()); }
  void sync() const { pthread_barrier_wait(&shared_.barrier); }
  template <typename T>
  void add(T* to, T n) const {
    __atomic_fetch_add(to, n, __ATOMIC_RELAXED);
  }
  void lowest(uint32_t* to, uint32_t n) const {
    uint32_t old = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (n < old && !__atomic_compare_exchange_n(to, &old, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  bool any(bool mine) const {
    bool found = false;
    for (const int flag : told(shared_.flags, int{mine})) found = found || flag;
    return found;
  }
  Run sum_before(Run mine) const { return sum_of(told(shared_.runs, mine), index_); }
  Run sum(Run mine) const { return sum_of(told(shared_.runs, mine), count()); }
  void largest(double& value, int& id) const {
    const std::vector<int> ids = told(shared_.ids, id);
    const std::vector<double> values = told(shared_.values, value);
    for (int i = 0; i < count(); ++i)
      if (values[i] > value || (values[i] == value && ids[i] < id)) value = values[i], id = ids[i];
  }

 private:
  // What every thread says.
  template <typename T>
  std::vector<T> told(std::vector<T>& board, T mine) const {
    board[index_] = mine;
    sync();
    const std::vector<T> all = board;
    sync();
    return all;
  }

  static Run sum_of(const std::vector<Run>& runs, int n) {
    Run sum = {0, 0};
    for (int i = 0; i < n; ++i) sum.n += runs[i].n, sum.likelihood += runs[i].likelihood;
    return sum;
  }

  Shared& shared_;
  int index_;
};

}  // namespace

extern "C" int choose_on_host(const mythos::cuda::Choosing* c, const float* logits, const uint32_t* seen, uint64_t* random, int threads) {
  Shared shared(threads);
  static mythos::cuda::ChoosingMemory memory;
  std::vector<uint64_t> distances(c->vocab), states(threads, *random);
  std::vector<int> chosen(threads);
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i)
    running.emplace_back([&, i] {
      chosen[i] = mythos::cuda::choose(*c, logits, seen, states[i], distances.data(), HostThreads(shared, i), memory);
    });
  for (std::thread& thread : running) thread.join();
  for (int i = 1; i < threads; ++i)
    if (chosen[i] != chosen[0] || states[i] != states[0]) return -2;
  *random = states[0];
  return chosen[0];
}

int main() {
  std::mt19937 engine(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (int round = 0; round < 60; ++round) {
    std::vector<float> logits(1 + engine() % 3000);
    for (float& logit : logits) logit = round % 3 == 0 ? 1.0f : normal(engine);
    const int top_k = round % 2 == 0 ? 0 : 5;
    const mythos::cuda::Choosing c = {static_cast<int>(logits.size()), top_k, 0.7, round % 5 == 0 ? 1.0 : 0.9, round % 4 == 0 ? 0.05 : 0.0, 1.0};
    uint64_t random = engine();
    const int token = choose_on_host(&c, logits.data(), nullptr, &random, 4);
    if (token < 0 || token >= c.vocab) {
      std::printf("round %d: token %d of %d\n", round, token, c.vocab);
      return 1;
    }
  }
  std::printf("choosing ok\n");
}
