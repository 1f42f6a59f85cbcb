// Prefill and decode speed of a bundle, in the table of `mythos-export bench`:
// bench BUNDLE [-p PREFILL_TOKENS] [-n DECODE_TOKENS] [-d TOKENS_IN_THE_CACHE] [-r REPETITIONS] [-b BATCH] [--threads N] [--loops N]
// [--chunk N]
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

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

// What this machine reads with so many threads, over 512 MB: on a shared one it changes by the second, so it is probed before and after
// every measurement, and shares are of the better of those two probes.
class ReadBandwidth {
 public:
  explicit ReadBandwidth(std::size_t threads) : threads_(threads), numbers_((std::size_t{512} << 20) / sizeof(uint64_t), 1) {}

  double probe() {
    double best = 0;
    for (int pass = 0; pass < 4; ++pass) best = std::max(best, once());
    probes.push_back(best);
    return best;
  }

  std::vector<double> probes;  // GB/s

 private:
  double once() {
    const std::size_t parts = threads_ * 8, each = numbers_.size() / parts / 8 * 8;
    std::atomic<std::size_t> next{0}, wrong{0};
    std::vector<std::thread> readers;
    const auto began = Clock::now();
    for (std::size_t i = 0; i < threads_; ++i)
      readers.emplace_back([&] {
        for (std::size_t part; (part = next++) < parts;) {
          const uint64_t* numbers = numbers_.data() + part * each;
          uint64_t lanes[8] = {};
          for (std::size_t at = 0; at < each; at += 8)
            for (std::size_t lane = 0; lane < 8; ++lane) lanes[lane] |= numbers[at + lane];
          wrong += static_cast<std::size_t>(std::count(lanes, lanes + 8, 1u) != 8);
        }
      });
    for (auto& reader : readers) reader.join();
    const double seconds = seconds_since(began);
    if (wrong) throw std::logic_error("memory does not hold what was written to it");
    return static_cast<double>(parts * each * sizeof(uint64_t)) / seconds / 1e9;
  }

  std::size_t threads_;
  std::vector<uint64_t> numbers_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

std::string formatted(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::string size(double bytes) {
  const char* units[] = {"%.0f B", "%.1f kB", "%.1f MB", "%.1f GB"};
  int unit = 0;
  for (; bytes >= 1000 && unit < 3; ++unit) bytes /= 1000;
  return formatted(units[unit], bytes);
}

// A row of the table: tokens a second of all sequences, and the bytes that each must read and write.
struct Test {
  std::string name;
  int64_t tokens;  // of each sequence
  double bytes;
  double (*seconds)(mythos::Runner&);
};

using Cells = std::vector<std::string>;

Cells measured(mythos::Runner& runner, const Test& test, ReadBandwidth& bandwidth) {
  std::vector<double> rates, shares;
  for (int64_t i = 0; i < options["-r"]; ++i) {
    const double before = bandwidth.probe();
    rates.push_back(static_cast<double>(test.tokens * options["-b"]) / test.seconds(runner));
    shares.push_back(test.bytes * rates.back() / 1e9 / std::max(before, bandwidth.probe()));
  }
  double mean = 0, squares = 0;
  for (const double rate : rates) mean += rate / static_cast<double>(rates.size());
  for (const double rate : rates) squares += (rate - mean) * (rate - mean);
  const double deviation = rates.size() > 1 ? std::sqrt(squares / static_cast<double>(rates.size() - 1)) : 0;
  return {test.name, formatted("%.2f", mean), formatted("%.2f", deviation), size(test.bytes), formatted("%.2f", test.bytes * mean / 1e9),
          formatted("%.1f %%", 100 * median(shares))};
}

std::size_t characters(const std::string& utf8) {
  return static_cast<std::size_t>(std::count_if(utf8.begin(), utf8.end(), [](char byte) { return (byte & 0xC0) != 0x80; }));
}

void print(std::vector<Cells> table) {
  std::vector<std::size_t> widths(table[0].size());
  for (const auto& row : table)
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], characters(row[i]));
  Cells line;
  for (const auto width : widths) line.push_back(std::string(width, '-'));
  table.insert(table.begin() + 1, line);
  for (const auto& row : table) {
    for (std::size_t i = 0; i < row.size(); ++i) std::printf("| %s%s ", row[i].c_str(), std::string(widths[i] - characters(row[i]), ' ').c_str());
    std::printf("|\n");
  }
}

}  // namespace

int main(int argc, char** argv) try {
  bool known = argc >= 2 && argc % 2 == 0;
  for (int i = 2; known && i < argc; i += 2) {
    known = options.count(argv[i]) == 1;
    if (known) options[argv[i]] = std::atoll(argv[i + 1]);
  }
  known = known && options["-p"] + options["-n"] > 0;
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
  const int64_t batch = options["-b"], prompt = options["-p"], n = options["-n"], context = options["-d"], loops = options["--loops"];
  const auto of_token = [&](double step_bytes, int64_t tokens) { return step_bytes / static_cast<double>(batch * tokens); };
  std::vector<Test> tests;
  if (prompt) tests.push_back({"pp" + std::to_string(prompt), prompt, of_token(runner.step_bytes(batch, prompt, 0, loops), prompt), prefill_seconds});
  if (n) {
    const double mean_past = static_cast<double>(context + 1) + static_cast<double>(n - 1) / 2;
    tests.push_back({"tg" + std::to_string(n) + (context ? " @ d" + std::to_string(context) : ""), n,
                     of_token(runner.step_bytes(batch, 1, mean_past, loops), 1), decode_seconds});
  }
  for (const auto& test : tests) test.seconds(runner);  // warm-up
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);  // before the probe takes memory
  ReadBandwidth bandwidth(options["--threads"] ? static_cast<std::size_t>(options["--threads"]) : std::max(1u, std::thread::hardware_concurrency()));
  std::vector<Cells> table = {{"test", "t/s", "± std", "bytes/token", "GB/s", "share of read bandwidth"}};
  for (const auto& test : tests) table.push_back(measured(runner, test, bandwidth));
  std::printf("%s, %s operators, %lld loops, batch %lld\n", info.backend, info.native ? "native" : "portable",
              static_cast<long long>(loops ? loops : info.default_loops), static_cast<long long>(batch));
  print(table);
  const double cache = static_cast<double>(batch * info.cache_bytes_per_token * std::max(prompt, context + n + 1));
  std::printf("read bandwidth here %.1f GB/s; peak memory %s, of it weights %s, cache %s\n", median(bandwidth.probes),
              size(static_cast<double>(usage.ru_maxrss) * 1024).c_str(), size(static_cast<double>(info.weight_bytes)).c_str(), size(cache).c_str());
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
