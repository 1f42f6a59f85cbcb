#include "sampling.h"

#include <algorithm>
#include <cmath>
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

// Sum of term(0) to term(n - 1), in four sums at once: one would wait for each addition.
template <typename Term>
double sum(size_t n, Term term) {
  double parts[4] = {0, 0, 0, 0};
  size_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (size_t lane = 0; lane < 4; ++lane) parts[lane] += term(i + lane);
  for (; i < n; ++i) parts[0] += term(i);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Ids by falling value, ties by rising id, sorted only as far as they are asked for: a draw seldom looks at many.
class Ranking {
 public:
  // values: their largest is 0.
  explicit Ranking(const std::vector<double>& values) : values_(values) {}

  int64_t operator[](size_t rank) {
    while (rank >= ids_.size()) sort_next_band();
    return ids_[rank];
  }

 private:
  void sort_next_band() {
    constexpr int kBands = 6;
    constexpr double kDepth = 3.5;
    const double above = band_ ? -kDepth * band_ : HUGE_VAL;
    ++band_;
    const double least = band_ < kBands ? -kDepth * band_ : -HUGE_VAL;
    const auto begin = static_cast<std::ptrdiff_t>(ids_.size());
    for (size_t id = 0; id < values_.size(); ++id)
      if (values_[id] >= least && values_[id] < above) ids_.push_back(static_cast<int64_t>(id));
    std::stable_sort(ids_.begin() + begin, ids_.end(), [this](int64_t a, int64_t b) { return values_[a] > values_[b]; });
  }

  const std::vector<double>& values_;
  std::vector<int64_t> ids_;
  int band_ = 0;
};

// Draws from what top_k, top_p and min_p leave. scaled: its largest is 0.
int64_t drawn(const std::vector<double>& scaled, const Sampling& sampling, double uniform) {
  size_t n = sampling.top_k ? std::min<size_t>(sampling.top_k, scaled.size()) : scaled.size();
  std::vector<double> likelihoods(scaled.size());
  double total = sum(scaled.size(), [&](size_t id) { return likelihoods[id] = std::exp(scaled[id]); });
  if (!std::isfinite(total))
    failed("the model's logits are no numbers, so none can be drawn; export the bundle again, and see what `mythos-export verify` says of it");
  Ranking ranking(scaled);
  const auto likelihood = [&](size_t rank) { return likelihoods[ranking[rank]]; };
  if (n < scaled.size()) total = sum(n, likelihood);
  if (sampling.top_p < 1 || sampling.min_p > 0) {
    double kept = 0;
    size_t rank = 0;
    while (rank < n && likelihood(rank) >= sampling.min_p && !(rank && kept / total >= sampling.top_p)) kept += likelihood(rank++);
    n = rank;
    total = kept;
  }
  double reached = 0;
  for (size_t rank = 0; rank + 1 < n; ++rank) {
    reached += likelihood(rank);
    if (reached > uniform * total) return ranking[rank];
  }
  return ranking[n - 1];
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
  return drawn(values, *this, random.uniform());
}

double log_probability(const float* logits, int64_t n, int64_t token) {
  const double largest = *std::max_element(logits, logits + n);
  return logits[token] - largest - std::log(sum(static_cast<size_t>(n), [&](size_t id) { return std::exp(logits[id] - largest); }));
}

}  // namespace mythos
