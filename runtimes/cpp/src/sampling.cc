#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
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

// The one of values [n] that comes before all others, sixteen in turn; what is no number is passed over. worst: where none is one.
template <typename T, typename Before>
T first_of(const T* values, int64_t n, T worst, Before before) {
  constexpr int64_t kLanes = 16;
  T first[kLanes];
  std::fill(first, first + kLanes, worst);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) first[lane] = before(values[i + lane], first[lane]) ? values[i + lane] : first[lane];
  for (; i < n; ++i) first[0] = before(values[i], first[0]) ? values[i] : first[0];
  return *std::min_element(first, first + kLanes, before);
}

template <typename T>
T largest_of(const T* values, int64_t n) {
  return first_of(values, n, -std::numeric_limits<T>::infinity(), std::greater<T>());
}

// The first place of the largest value; 0 where none is a number.
template <typename T>
int64_t place_of_largest(const T* values, int64_t n) {
  const T* found = std::find(values, values + n, largest_of(values, n));
  return found == values + n ? 0 : found - values;
}

// Candidates by falling value, ties by rising id. They are laid into bins by value; only the bin where a run of candidates ends is put
// in order, as far as it must be.
class Candidates {
 public:
  // So many, the likeliest.
  struct First {
    size_t n;
    double likelihood;  // of all of them
    int64_t last;       // the id of the last one, where first_with met it
  };

  // scratch.scaled: their values, the largest of which is 0; scratch.likelihoods: the exponentials of those.
  explicit Candidates(Scratch& scratch)
      : values_(scratch.scaled), likelihoods_(scratch.likelihoods), bin_of_(scratch.bin_of), bins_(scratch.bins), ranked_(scratch.ranked) {
    constexpr double kDeepest = 36, kFlattest = 1e-9;  // all that lies deeper is one bin, all that is flatter too
    const double least = first_of(values_.data(), static_cast<int64_t>(values_.size()), 0.0, std::less<double>());
    const double depth = std::min(kDeepest, -least);
    const double bins_a_unit = depth > kFlattest ? (kBins - 1) / depth : 0;
    bin_of_.resize(values_.size());
    for (size_t id = 0; id < values_.size(); ++id)
      bin_of_[id] = static_cast<uint16_t>(std::min(-values_[id] * bins_a_unit, kBins - 1.0));
    bins_.assign(kBins * kParts, Bin{});
    for (size_t id = 0; id < values_.size(); ++id) {
      Bin& part = bins_[bin_of_[id] * kParts + id % kParts];
      part.likelihood += likelihoods_[id];
      ++part.n;
    }
  }

  // The fewest, from the first on, that are enough(how many, their total likelihood); all where they never are.
  template <typename Enough>
  First first_with(Enough enough) {
    First first{0, 0, 0};
    for (size_t bin = 0; bin < kBins; ++bin) {
      Bin all;
      for (size_t part = bin * kParts; part < (bin + 1) * kParts; ++part)
        all = {all.n + bins_[part].n, all.likelihood + bins_[part].likelihood};
      if (all.n == 0) continue;
      if (!enough(first.n + all.n, first.likelihood + all.likelihood)) {
        first.n += all.n;
        first.likelihood += all.likelihood;
      } else if (ends_in(bin, first, enough)) {
        break;
      }
    }
    return first;
  }

 private:
  static constexpr size_t kBins = 1024, kParts = 4;  // each bin is summed in parts: one sum would wait for each addition

  static bool comes_before(const Ranked& a, const Ranked& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

  // Adds candidates of this bin to `first` until they are enough. Returns whether they ever are: sums in another order may differ in
  // their last digits.
  template <typename Enough>
  bool ends_in(size_t bin, First& first, Enough enough) {
    constexpr std::ptrdiff_t kFew = 24;
    ranked_.clear();
    for (size_t id = 0; id < bin_of_.size(); ++id)
      if (bin_of_[id] == bin) ranked_.push_back({values_[id], static_cast<int64_t>(id)});
    for (auto from = ranked_.begin(); from != ranked_.end();) {
      auto to = ranked_.end();
      while (to - from > kFew) {  // halves that are not enough are passed over unsorted
        const auto middle = from + (to - from) / 2;
        std::nth_element(from, middle, to, comes_before);
        First half = first;
        for (auto each = from; each != middle; ++each) half = with(half, *each);
        if (enough(half.n, half.likelihood)) {
          to = middle;
        } else {
          first = half;
          from = middle;
        }
      }
      std::sort(from, to, comes_before);
      for (; from != to; ++from)
        if (first = with(first, *from); enough(first.n, first.likelihood)) return true;
    }
    return false;
  }

  First with(const First& first, const Ranked& next) const { return {first.n + 1, first.likelihood + likelihoods_[next.id], next.id}; }

  const std::vector<double>&values_, &likelihoods_;
  std::vector<uint16_t>& bin_of_;  // each candidate's
  std::vector<Bin>& bins_;
  std::vector<Ranked>& ranked_;  // the candidates of one bin
};

// Draws from what top_k, top_p and min_p leave of scratch.scaled, the largest of which is 0.
int64_t drawn(Scratch& scratch, const Sampling& sampling, double uniform) {
  const size_t n = scratch.scaled.size();
  scratch.likelihoods.resize(n);
  const double total = exponentials(scratch.scaled.data(), n, scratch.likelihoods.data());
  if (!std::isfinite(total))
    failed("the model's logits are no numbers, so none can be drawn; export the bundle again, and see what `mythos-export verify` says of it");
  Candidates candidates(scratch);
  Candidates::First kept{n, total, 0};
  const auto keep = [&](size_t most) {
    if (most < kept.n) kept = candidates.first_with([&](size_t count, double) { return count >= most; });
  };
  if (sampling.top_k) keep(static_cast<size_t>(sampling.top_k));
  if (sampling.top_p < 1)
    kept = candidates.first_with(
        [&, of = kept](size_t count, double reached) { return reached / of.likelihood >= sampling.top_p || count >= of.n; });
  if (sampling.min_p > 0)
    keep(static_cast<size_t>(
        std::count_if(scratch.likelihoods.begin(), scratch.likelihoods.end(), [&](double each) { return each >= sampling.min_p; })));
  return candidates.first_with([&](size_t count, double reached) { return reached > uniform * kept.likelihood || count >= kept.n; }).last;
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
  if (temperature == 0 && repetition_penalty == 1) return place_of_largest(logits, n);
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
  if (temperature == 0) return place_of_largest(values.data(), n);
  const double top = largest_of(values.data(), n);
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
