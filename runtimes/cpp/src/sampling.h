// Choosing the next token from logits: the algorithm of runtimes/sampling.py, step by step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mythos {

// The generator of java.util.SplittableRandom (Steele, Lea, Flood 2014).
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t next();
  // In [0, 1), from the upper 53 bits.
  double uniform();

 private:
  uint64_t state_;
};

// A token's scaled logit.
struct Ranked {
  double value;
  int64_t id;
};

// Tokens of about the same scaled logit: how many, and the sum of its exponentials.
struct Bin {
  size_t n = 0;
  double likelihood = 0;
};

// Memory that choices of one thread use in turn, so that each need not ask the system for it.
struct Scratch {
  std::vector<double> scaled, likelihoods;
  std::vector<uint16_t> bin_of;
  std::vector<Bin> bins;
  std::vector<Ranked> ranked;
  std::vector<char> marked;
};

struct Sampling {
  double temperature = 0, top_p = 1, min_p = 0, repetition_penalty = 1;
  int64_t top_k = 0;

  // Throws Error where a value makes no sense.
  void check() const;
  // The next token's id from logits [n]; seen: prompt and generated ids so far, all within 0 to n - 1.
  int64_t choose(const float* logits, int64_t n, const std::vector<int64_t>& seen, SplitMix64& random, Scratch& scratch) const;
};

// Natural log-probability of one token under logits [n].
double log_probability(const float* logits, int64_t n, int64_t token);

}  // namespace mythos
