#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.h"
#include "exponential.h"

namespace mythos {

uint64_t SplitMix64::next() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

double SplitMix64::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

namespace {

// The largest of logits [n], sixteen in turn; what is no number is passed over.
float largest_of(const float* logits, int64_t n) {
  constexpr int64_t kLanes = 16;
  float most[kLanes];
  std::fill(most, most + kLanes, -HUGE_VALF);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = logits[i + lane] > most[lane] ? logits[i + lane] : most[lane];
  for (; i < n; ++i) most[0] = logits[i] > most[0] ? logits[i] : most[0];
  return *std::max_element(most, most + kLanes);
}

// Candidates by falling value, ties by rising id, put in order only as far as they are asked for: a draw seldom looks at many.
class Candidates {
 public:
  // So many, the likeliest.
  struct First {
    size_t n;
    double likelihood;  // of all of them
  };

  // scratch.scaled: their values, the largest of which is 0; scratch.likelihoods: the exponentials of those.
  explicit Candidates(Scratch& scratch)
      : values_(scratch.scaled), likelihoods_(scratch.likelihoods), ranked_(scratch.ranked), left_(scratch.scaled.size()) {
    ranked_.resize(left_);
  }

  size_t size() const { return left_; }

  // Leaves those of first_with; returns their total likelihood.
  double keep(const First& first) {
    found_ = left_ = first.n;
    return first.likelihood;
  }

  // Leaves the first n, fewer than there are; returns their total likelihood.
  double keep(size_t n) {
    if (found_ < n) find(n);
    std::nth_element(at(0), at(n - 1), at(found_), comes_before);
    return keep(First{n, sum(0, n)});
  }

  // The fewest, from the first on, whose total likelihood is `enough`; all where it never is.
  template <typename Enough>
  First first_with(Enough enough) {
    constexpr size_t kFew = 24;
    double reached = 0;
    for (size_t from = 0; from < left_;) {
      while (from == found_) find_next_band();
      size_t to = found_;
      // What is not enough is passed over unsorted: all that was found, if more is to come, then halves of it.
      const double band = to < left_ ? sum(from, to) : HUGE_VAL;
      if (!enough(reached + band)) {
        reached += band;
        from = to;
        continue;
      }
      while (to - from > kFew) {
        const size_t middle = from + (to - from) / 2;
        std::nth_element(at(from), at(middle), at(to), comes_before);
        const double half = sum(from, middle);
        if (enough(reached + half)) {
          to = middle;
        } else {
          reached += half;
          from = middle;
        }
      }
      std::sort(at(from), at(to), comes_before);
      for (; from < to; ++from)
        if (enough(reached += likelihood(from))) return {from + 1, reached};
    }
    return {left_, reached};
  }

  // The last of those.
  int64_t last(const First& first) const { return ranked_[first.n - 1].id; }

 private:
  static bool comes_before(const Ranked& a, const Ranked& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

  std::vector<Ranked>::iterator at(size_t rank) { return ranked_.begin() + static_cast<std::ptrdiff_t>(rank); }

  double likelihood(size_t rank) const { return likelihoods_[ranked_[rank].id]; }

  double sum(size_t from, size_t to) const {
    double parts[4] = {0, 0, 0, 0};  // one would wait for each addition
    for (size_t rank = from; rank < to; ++rank) parts[rank % 4] += likelihood(rank);
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }

  // Calls found with those whose values are not below least(), by rising id.
  template <typename Least, typename Found>
  void for_each(Least least, Found found) {
    constexpr size_t kBlock = 32;  // most hold none of them
    for (size_t block = 0; block < values_.size(); block += kBlock) {
      const size_t end = std::min(block + kBlock, values_.size());
      const double threshold = least();
      int64_t within = 0;
      for (size_t id = block; id < end; ++id) within += values_[id] >= threshold ? 1 : 0;
      if (!within) continue;
      for (size_t id = block; id < end; ++id)
        if (values_[id] >= threshold) found(Ranked{values_[id], static_cast<int64_t>(id)});
    }
  }

  // The first n, among others: what cannot be of them is left out from time to time.
  void find(size_t n) {
    double threshold = -HUGE_VAL;
    found_ = 0;
    for_each([&] { return threshold; }, [&](const Ranked& candidate) {
      ranked_[found_++] = candidate;
      if (found_ < 4 * n) return;
      std::nth_element(at(0), at(n - 1), at(found_), comes_before);
      threshold = ranked_[n - 1].value;
      found_ = n;
    });
  }

  // Those whose values lie in the next range downwards.
  void find_next_band() {
    constexpr double kDepth = 2, kDeepest = -20;  // everything below is one band
    const double above = least_, least = above > 0 ? -kDepth : above > kDeepest ? above - kDepth : -HUGE_VAL;
    for_each([&] { return least; }, [&](const Ranked& candidate) {
      if (candidate.value < above) ranked_[found_++] = candidate;
    });
    least_ = least;
  }

  const std::vector<double>&values_, &likelihoods_;
  std::vector<Ranked>& ranked_;  // the first found_ of them, each before all others
  size_t left_, found_ = 0;
  double least_ = HUGE_VAL;  // value of what was found
};

// Draws from what top_k, top_p and min_p leave of scratch.scaled, the largest of which is 0.
int64_t drawn(Scratch& scratch, const Sampling& sampling, double uniform) {
  scratch.likelihoods.resize(scratch.scaled.size());
  double total = exponentials(scratch.scaled.data(), scratch.scaled.size(), scratch.likelihoods.data());
  if (!std::isfinite(total))
    failed("the model's logits are no numbers, so none can be drawn; export the bundle again, and see what `mythos-export verify` says of it");
  Candidates candidates(scratch);
  if (sampling.top_k && static_cast<size_t>(sampling.top_k) < candidates.size()) total = candidates.keep(static_cast<size_t>(sampling.top_k));
  if (sampling.top_p < 1)
    total = candidates.keep(candidates.first_with([&, all = total](double reached) { return reached / all >= sampling.top_p; }));
  if (sampling.min_p > 0) {
    const auto likely = std::count_if(scratch.likelihoods.begin(), scratch.likelihoods.end(), [&](double each) { return each >= sampling.min_p; });
    if (static_cast<size_t>(likely) < candidates.size()) total = candidates.keep(static_cast<size_t>(likely));
  }
  return candidates.last(candidates.first_with([&](double reached) { return reached > uniform * total; }));
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

int64_t Sampling::choose(const float* logits, int64_t n, const std::vector<int64_t>& seen, SplitMix64& random, Scratch& scratch) const {
  if (temperature == 0 && repetition_penalty == 1) {
    const float* found = std::find(logits, logits + n, largest_of(logits, n));
    return found == logits + n ? 0 : found - logits;  // where none is a number
  }
  std::vector<double>& values = scratch.scaled;
  values.assign(logits, logits + n);
  if (repetition_penalty != 1) {
    scratch.marked.resize(static_cast<size_t>(n));
    for (const int64_t id : seen) {
      if (scratch.marked[id]) continue;
      scratch.marked[id] = 1;
      values[id] = values[id] > 0 ? values[id] / repetition_penalty : values[id] * repetition_penalty;
    }
    for (const int64_t id : seen) scratch.marked[id] = 0;
  }
  const auto largest = std::max_element(values.begin(), values.end());
  if (temperature == 0) return largest - values.begin();
  const double top = *largest;
  for (double& value : values) value = (value - top) / temperature;
  return drawn(scratch, *this, random.uniform());
}

double log_probability(const float* logits, int64_t n, int64_t token) {
  constexpr int64_t kPiece = 512;
  double piece[kPiece], total = 0;
  const double largest = largest_of(logits, n);
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t count = std::min(kPiece, n - start);
    for (int64_t i = 0; i < count; ++i) piece[i] = logits[start + i] - largest;
    total += exponentials(piece, static_cast<size_t>(count), piece);
  }
  return logits[token] - largest - std::log(total);
}

}  // namespace mythos
