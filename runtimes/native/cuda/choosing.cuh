// Choosing a token from a row of logits, in the order of runtimes/sampling.py: repetition penalty, temperature, top_k, top_p, min_p, one
// draw. No header of CUDA: a test compiles it for the host as well.
//
// Candidates stand by rising distance from the largest value, ties by rising id. None is sorted: each limit is the place where a sum over
// them reaches something, found digit by digit, as a radix sort would put them, each digit's candidates counted and their likelihoods
// summed. Those are integers, so that the order in which threads add them does not matter.
//
// Shape letters: V vocab.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MYTHOS_BOTH __host__ __device__ __forceinline__
#else
#define MYTHOS_BOTH inline
#endif

namespace mythos::cuda {

struct Choosing {
  int vocab, top_k;  // top_k 0 keeps all
  double temperature, top_p, min_p, repetition_penalty;
};

constexpr int kMostVocab = 1 << 20;       // the sum of as many likelihoods fits
constexpr double kLikelihoodOne = 0x1p43;  // what 1 is as an integer
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kIdBits = 20;

// The next 64 bits of SplitMix64 (Steele, Lea, Flood 2014), as a float64 in [0, 1).
MYTHOS_BOTH double uniform_of(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return double((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// Candidates from the first on: how many, and the sum of their likelihoods.
struct Run {
  uint32_t n;
  uint64_t likelihood;
};

// Of one digit's values: the candidates with each, and the lowest id among them.
struct Bins {
  uint64_t likelihood[kBins];
  uint32_t n[kBins], lowest[kBins];
};

// What all threads of a block share.
struct ChoosingMemory {
  Bins bins;
  Run before;     // the bin found
  uint32_t found;
};

MYTHOS_BOTH double value_of(const Choosing& c, const float* logits, const uint32_t* seen, int id) {
  const double value = logits[id];
  if (seen == nullptr || (seen[id / 32] >> (id % 32) & 1) == 0) return value;
  return value > 0 ? value / c.repetition_penalty : value * c.repetition_penalty;
}

MYTHOS_BOTH uint64_t as_integer(double likelihood) { return uint64_t(likelihood * kLikelihoodOne + 0.5); }

// The first digit: a distance's exponent and 7 bits of its fraction, from 2^-10 to 2^6; what is outside is in the outermost ones.
MYTHOS_BOTH int first_digit(uint64_t distance_bits) {
  constexpr int64_t kLeast = int64_t(1023 - 10) << 7;
  const int64_t digit = int64_t(distance_bits >> 45) - kLeast;
  return int(digit < 0 ? 0 : digit >= kBins ? kBins - 1 : digit);
}

// Threads: index(), count(), sync(), add() and lowest() on shared memory, and over all threads sum_before() of a Run.
template <typename Threads>
class Candidates {
 public:
  // distances [V]: as bits, which are in the same order.
  MYTHOS_BOTH Candidates(const Threads& threads, const uint64_t* distances, int vocab, ChoosingMemory& memory)
      : threads_(threads), distances_(distances), vocab_(vocab), memory_(memory) {}

  // The fewest candidates, from the first on, for which enough(run) holds, as it does for all and for any more; the id of the last.
  template <typename Enough>
  MYTHOS_BOTH Run first_with(const Enough& enough, int* last) {
    tally([](uint64_t distance, int, int* digit) { *digit = first_digit(distance); return true; });
    Run before = {0, 0};
    const int bin = find(enough, before);
    // Digits of the distance that the first one leaves open, then of the id.
    int open = bin == 0 || bin == kBins - 1 ? 64 : 45;
    uint64_t prefix = 0;
    bool has_prefix = false;
    while (memory_.bins.n[memory_.found] > 1 && open > 0) {
      const int bits = open < kDigitBits ? open : kDigitBits, above = open;
      open -= bits;
      tally([=](uint64_t distance, int, int* digit) {
        *digit = int(distance >> open & ((1u << bits) - 1));
        return first_digit(distance) == bin && (!has_prefix || distance >> above == prefix);
      });
      const uint64_t digit = uint64_t(find(enough, before));
      prefix = has_prefix ? prefix << bits | digit : digit;
      if (!has_prefix && bin > 0 && bin < kBins - 1) prefix |= (uint64_t(bin) + (uint64_t(1023 - 10) << 7)) << bits;
      has_prefix = true;
    }
    int id_prefix = 0;
    for (int id_open = kIdBits; memory_.bins.n[memory_.found] > 1 && id_open > 0;) {  // as far from the largest, all of them
      const int bits = id_open < kDigitBits ? id_open : kDigitBits, above = id_open;
      id_open -= bits;
      tally([=](uint64_t distance, int id, int* digit) {
        *digit = id >> id_open & ((1 << bits) - 1);
        return distance == prefix && (above == kIdBits || id >> above == id_prefix);
      });
      id_prefix = id_prefix << bits | find(enough, before);
    }
    const uint32_t bin_found = memory_.found;
    *last = int(memory_.bins.lowest[bin_found]);
    const Run run = {before.n + 1, before.likelihood + memory_.bins.likelihood[bin_found]};
    threads_.sync();
    return run;
  }

 private:
  // Counts candidates by digit: those for which is_one(distance, id, &digit).
  template <typename IsOne>
  MYTHOS_BOTH void tally(const IsOne& is_one) {
    threads_.sync();
    for (int bin = threads_.index(); bin < kBins; bin += threads_.count())
      memory_.bins.n[bin] = 0, memory_.bins.likelihood[bin] = 0, memory_.bins.lowest[bin] = uint32_t(vocab_);
    threads_.sync();
    for (int id = threads_.index(); id < vocab_; id += threads_.count()) {
      const uint64_t distance = distances_[id];
      int digit;
      if (!is_one(distance, id, &digit)) continue;
      threads_.add(&memory_.bins.n[digit], uint32_t(1));
      double far;
      memcpy(&far, &distance, sizeof far);
      threads_.add(&memory_.bins.likelihood[digit], as_integer(exp(-far)));
      threads_.lowest(&memory_.bins.lowest[digit], uint32_t(id));
    }
    threads_.sync();
  }

  // The bin in which enough begins to hold; before: gets what comes before that bin, and is what comes before all of them.
  template <typename Enough>
  MYTHOS_BOTH int find(const Enough& enough, Run& before) {
    const int each = kBins / threads_.count(), first = threads_.index() * each;
    Run mine = {0, 0};
    for (int bin = first; bin < first + each; ++bin)
      mine.n += memory_.bins.n[bin], mine.likelihood += memory_.bins.likelihood[bin];
    const Run others = threads_.sum_before(mine);
    Run run = {before.n + others.n, before.likelihood + others.likelihood};
    bool held = run.n > before.n && enough(run);
    for (int bin = first; bin < first + each && !held; ++bin) {
      const Run next = {run.n + memory_.bins.n[bin], run.likelihood + memory_.bins.likelihood[bin]};
      if (next.n > run.n && enough(next)) {
        memory_.before = run, memory_.found = uint32_t(bin);
        held = true;
      }
      run = next;
    }
    threads_.sync();
    before = memory_.before;
    return int(memory_.found);
  }

  const Threads& threads_;
  const uint64_t* distances_;
  int vocab_;
  ChoosingMemory& memory_;
};

// The token, for all threads; -1 where one is to be drawn from what is no number. distances: scratch [V]. random: the state, which goes
// on where a token is drawn. Threads has besides, over all threads: largest() of a double, with the lowest id among equals, and any().
template <typename Threads>
MYTHOS_BOTH int choose(const Choosing& c, const float* logits, const uint32_t* seen, uint64_t& random, uint64_t* distances,
                       const Threads& threads, ChoosingMemory& memory) {
  double top = -INFINITY;
  int token = 0;
  for (int id = threads.index(); id < c.vocab; id += threads.count()) {
    const double value = value_of(c, logits, seen, id);
    if (value > top) top = value, token = id;
  }
  threads.largest(top, token);
  if (c.temperature == 0) return token;

  uint32_t likely = 0;  // at least min_p as likely as the first
  bool is_bad = false;
  uint64_t total = 0;
  for (int id = threads.index(); id < c.vocab; id += threads.count()) {
    const double distance = fabs((top - value_of(c, logits, seen, id)) / c.temperature);  // of two zeros too: their bits are compared
    is_bad = is_bad || distance != distance;
    memcpy(&distances[id], &distance, sizeof distance);
    const double likelihood = exp(-distance);
    total += as_integer(likelihood);
    likely += likelihood >= c.min_p;
  }
  if (threads.any(is_bad)) return -1;
  const double drawn = uniform_of(random);
  Run kept = threads.sum({likely, total});
  const uint32_t most = kept.n;
  kept.n = uint32_t(c.vocab);

  Candidates<Threads> candidates(threads, distances, c.vocab, memory);
  int last = 0;
  const auto keep = [&](uint32_t n) {
    if (n > 0 && n < kept.n) kept = candidates.first_with([n](const Run& run) { return run.n >= n; }, &last);
  };
  keep(uint32_t(c.top_k));
  if (c.top_p < 1) {
    const Run of = kept;
    const double top_p = c.top_p;
    kept = candidates.first_with(
        [of, top_p](const Run& run) { return double(run.likelihood) / double(of.likelihood) >= top_p || run.n >= of.n; }, &last);
  }
  if (c.min_p > 0) keep(most);
  const double reach = drawn * double(kept.likelihood);
  const uint32_t n = kept.n;
  candidates.first_with([reach, n](const Run& run) { return double(run.likelihood) > reach || run.n >= n; }, &last);
  return last;
}

}  // namespace mythos::cuda
