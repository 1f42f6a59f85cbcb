// A control loop that must answer in time: every tick generates a few tokens after what was sensed, and where a token takes longer than
// its share of the budget, the model runs fewer loops from there on: robot_loop BUNDLE BUDGET_MS [TICKS]
// The bundle's loop count must be dynamic.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "mythos/runtime.hpp"

namespace {

constexpr int kTokens = 8;  // an answer

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point began) {
  return std::chrono::duration<double, std::milli>(Clock::now() - began).count();
}

int64_t likeliest(const std::vector<float>& logits) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < logits.size(); ++i)
    if (logits[i] > logits[best]) best = i;
  return static_cast<int64_t>(best);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s BUNDLE BUDGET_MS [TICKS]\n", argv[0]);
    return 2;
  }
  const double budget = std::atof(argv[2]);
  const int ticks = argc > 3 ? std::atoi(argv[3]) : 5;
  mythos::Runner runner(argv[1]);
  const auto info = runner.info();
  if (info.loops || !info.max_loops) {
    std::fprintf(stderr, "error: %s runs %lld loops, no fewer; export it with --loops dynamic\n", argv[1], static_cast<long long>(info.loops));
    return 2;
  }
  for (int tick = 0; tick < ticks; ++tick) {
    const auto began = Clock::now();
    int64_t loops = info.default_loops;
    mythos::Session session = runner.session(1, {loops});
    mythos::Ids next = {tick % info.vocab_size, (7 * tick + 3) % info.vocab_size};  // what the sensors say, as tokens
    for (int i = 0; i < kTokens; ++i) {
      const auto step_began = Clock::now();
      next = {likeliest(session.advance({next}).logits)};
      const double a_loop = milliseconds_since(step_began) / static_cast<double>(loops);
      const double share = (budget - milliseconds_since(began)) / (kTokens - i);  // of what is left, for the next token
      while (loops > 1 && a_loop * static_cast<double>(loops) > share) --loops;
      session.lower_n_loops({loops});
    }
    std::printf("tick %d: %.1f of %.1f ms, %lld loops at the end\n", tick, milliseconds_since(began), budget, static_cast<long long>(loops));
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
