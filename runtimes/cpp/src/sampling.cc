#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <string>

#include "error.h"

namespace mythos {

uint64_t SplitMix64::next() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

double SplitMix64::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

namespace {

struct Candidates {
  std::vector<int64_t> ids;  // most likely first, ties by rising id
  std::vector<double> probabilities;
};

Candidates candidates(const std::vector<double>& scaled, const Sampling& sampling) {
  Candidates kept;
  kept.ids.resize(scaled.size());
  std::iota(kept.ids.begin(), kept.ids.end(), int64_t{0});
  const auto likelier = [&](int64_t a, int64_t b) { return scaled[a] != scaled[b] ? scaled[a] > scaled[b] : a < b; };
  const size_t most = sampling.top_k ? std::min<size_t>(sampling.top_k, scaled.size()) : scaled.size();
  std::partial_sort(kept.ids.begin(), kept.ids.begin() + most, kept.ids.end(), likelier);
  kept.ids.resize(most);
  double total = 0;
  for (const int64_t id : kept.ids) {
    kept.probabilities.push_back(std::exp(scaled[id] - scaled[kept.ids[0]]));
    total += kept.probabilities.back();
  }
  for (double& probability : kept.probabilities) probability /= total;
  if (sampling.top_p < 1) {
    double reached = 0;
    size_t n = 0;
    while (n < kept.ids.size()) {
      reached += kept.probabilities[n++];
      if (reached >= sampling.top_p) break;
    }
    kept.ids.resize(n);
    kept.probabilities.resize(n);
  }
  if (sampling.min_p > 0) {
    size_t n = 0;
    while (n < kept.ids.size() && kept.probabilities[n] >= sampling.min_p * kept.probabilities[0]) ++n;
    kept.ids.resize(n);
    kept.probabilities.resize(n);
  }
  return kept;
}

}  // namespace

void Sampling::check() const {
  const struct {
    const char* name;
    double value;
    bool ok;
    const char* expected;
  } rules[] = {
      {"temperature", temperature, temperature >= 0 && std::isfinite(temperature), "a number of at least 0 (0 is greedy)"},
      {"top_k", static_cast<double>(top_k), top_k >= 0, "an integer of at least 0 (0 keeps all)"},
      {"top_p", top_p, top_p > 0 && top_p <= 1, "a number above 0 and at most 1 (1 keeps all)"},
      {"min_p", min_p, min_p >= 0 && min_p <= 1, "a number from 0 to 1 (0 keeps all)"},
      {"repetition_penalty", repetition_penalty, repetition_penalty > 0 && std::isfinite(repetition_penalty),
       "a number above 0 (1 is none)"},
  };
  for (const auto& rule : rules)
    if (!rule.ok) refuse(std::string(rule.name) + " is " + std::to_string(rule.value) + "; expected " + rule.expected);
}

int64_t Sampling::choose(const float* logits, int64_t n, const std::vector<int64_t>& seen, SplitMix64& random) const {
  if (temperature == 0 && repetition_penalty == 1) return std::max_element(logits, logits + n) - logits;
  std::vector<double> values(logits, logits + n);
  if (repetition_penalty != 1) {
    for (const int64_t id : std::set<int64_t>(seen.begin(), seen.end()))
      values[id] = values[id] > 0 ? values[id] / repetition_penalty : values[id] * repetition_penalty;
  }
  const auto largest = std::max_element(values.begin(), values.end());
  if (temperature == 0) return largest - values.begin();
  const double top = *largest;
  for (double& value : values) value = (value - top) / temperature;
  const Candidates kept = candidates(values, *this);
  std::vector<double> cumulative(kept.probabilities.size());
  std::partial_sum(kept.probabilities.begin(), kept.probabilities.end(), cumulative.begin());
  const double drawn = random.uniform() * cumulative.back();
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), drawn);
  const size_t at = std::min<size_t>(found - cumulative.begin(), kept.ids.size() - 1);
  return kept.ids[at];
}

double log_probability(const float* logits, int64_t n, int64_t token) {
  const double largest = *std::max_element(logits, logits + n);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += std::exp(logits[i] - largest);
  return logits[token] - largest - std::log(total);
}

}  // namespace mythos
