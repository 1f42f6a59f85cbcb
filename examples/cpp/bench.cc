// Prefill and decode speed of a bundle, in the rows and columns of `mythos-export bench` that need no description of the model:
// bench BUNDLE [-p PREFILL_TOKENS] [-n DECODE_TOKENS] [-d TOKENS_IN_THE_CACHE] [-r REPETITIONS] [-b BATCH] [--threads N] [--loops N]
// [--chunk N]
#include <sys/resource.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>

#include "mythos/runtime.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using Rows = std::vector<mythos::Ids>;

std::map<std::string, int64_t> options = {{"-p", 512}, {"-n", 128}, {"-d", 0}, {"-r", 5}, {"-b", 1}, {"--threads", 0}, {"--loops", 0}, {"--chunk", 0}};

double seconds_since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

Rows tokens(int64_t n, int64_t vocab_size) {
  static std::mt19937_64 random(0);
  Rows rows(static_cast<std::size_t>(options["-b"]), mythos::Ids(static_cast<std::size_t>(n)));
  for (auto& row : rows)
    for (auto& id : row) id = static_cast<int64_t>(random() % static_cast<uint64_t>(vocab_size));
  return rows;
}

mythos::Session session(mythos::Runner& runner) {
  return runner.session(options["-b"], mythos::Ids(options["--loops"] ? static_cast<std::size_t>(options["-b"]) : 0, options["--loops"]));
}

double prefill_seconds(mythos::Runner& runner) {
  auto sequences = session(runner);
  const auto prompt = tokens(options["-p"], runner.info().vocab_size);
  const auto began = Clock::now();
  sequences.advance(prompt);
  return seconds_since(began);
}

double decode_seconds(mythos::Runner& runner) {
  auto sequences = session(runner);
  const int64_t vocab_size = runner.info().vocab_size;
  sequences.advance(tokens(options["-d"] + 1, vocab_size));
  std::vector<Rows> steps;
  for (int64_t i = 0; i < options["-n"]; ++i) steps.push_back(tokens(1, vocab_size));
  const auto began = Clock::now();
  for (const auto& step : steps) sequences.advance(step);
  return seconds_since(began);
}

void print_row(const std::string& test, double rate, double deviation) { std::printf("| %-14s | %8.2f | %7.2f |\n", test.c_str(), rate, deviation); }

void measure(mythos::Runner& runner, const std::string& test, int64_t each, double (*seconds)(mythos::Runner&)) {
  if (!each) return;
  const auto n = static_cast<double>(options["-r"]);
  seconds(runner);  // warm-up
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < options["-r"]; ++i) {
    const double rate = static_cast<double>(each * options["-b"]) / seconds(runner);
    sum += rate;
    squares += rate * rate;
  }
  const double mean = sum / n;
  print_row(test, mean, n > 1 ? std::sqrt(std::max(squares - n * mean * mean, 0.0) / (n - 1)) : 0);
}

}  // namespace

int main(int argc, char** argv) try {
  bool known = argc >= 2 && argc % 2 == 0;
  for (int i = 2; known && i < argc; i += 2) {
    known = options.count(argv[i]) == 1;
    if (known) options[argv[i]] = std::atoll(argv[i + 1]);
  }
  for (const auto& [name, value] : options) known = known && value >= (name == "-r" || name == "-b" ? 1 : 0);
  if (!known) {
    std::fprintf(stderr, "usage: %s BUNDLE [-p N] [-n N] [-d N] [-r N] [-b N] [--threads N] [--loops N] [--chunk N]; -r and -b at least 1\n", argv[0]);
    return 2;
  }
  mythos::Options how;
  how.threads = static_cast<int32_t>(options["--threads"]);
  how.prefill_chunk = options["--chunk"];
  mythos::Runner runner(argv[1], how);
  const auto info = runner.info();
  std::printf("%s, %s operators, batch %lld\n", info.backend, info.native ? "native" : "portable", static_cast<long long>(options["-b"]));
  std::printf("| test           | t/s      | ± std   |\n| -------------- | -------- | ------- |\n");
  measure(runner, "pp" + std::to_string(options["-p"]), options["-p"], prefill_seconds);
  const std::string context = options["-d"] ? " @ d" + std::to_string(options["-d"]) : "";
  measure(runner, "tg" + std::to_string(options["-n"]) + context, options["-n"], decode_seconds);
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  std::printf("peak memory %.1f MB, of it weights %.1f MB\n", static_cast<double>(usage.ru_maxrss) * 1024e-6,
              static_cast<double>(info.weight_bytes) * 1e-6);
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
