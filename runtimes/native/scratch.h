// Memory for one call, and the host's threads.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace mythos {

// Runs task(0) … task(n - 1), in any order, on whatever threads the host has.
struct Parallel {
  void* host;
  void (*run)(void* host, void (*task)(void* data, size_t index), size_t n, void* data);
};

// Floats, aligned for any vector.
class Scratch {
 public:
  explicit Scratch(size_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) / 64 + 1) * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

// Calls body(i) for i in [0, n) through the host's threads.
template <typename Body>
void ForEach(const Parallel& parallel, size_t n, const Body& body) {
  if (n == 1) {
    body(size_t{0});
    return;
  }
  parallel.run(
      parallel.host, [](void* data, size_t index) { (*static_cast<const Body*>(data))(index); }, n,
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Tokens that are worked on together where what they need in between is large: enough for weights to be read few times, few enough
// for that memory to be small beside the weights.
constexpr size_t kMostTokens = 256;

// Calls body(first, count) for tokens [0, n) in turn, at most kMostTokens at a time.
template <typename Body>
void ForPieces(size_t n, const Body& body) {
  for (size_t first = 0; first < n; first += kMostTokens) body(first, n - first < kMostTokens ? n - first : kMostTokens);
}

inline size_t CeilDiv(size_t a, size_t b) { return (a + b - 1) / b; }

}  // namespace mythos
