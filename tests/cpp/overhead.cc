// Time a token takes outside onnxruntime: overhead BUNDLE [TOKENS [TEMPERATURE [THREADS [TOP_K [TOP_P]]]]] prints its median and 99th percentile in
// microseconds, decoding one sequence. Built by hand: cmake --build … --target overhead
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "../../runtimes/cpp/src/bundle.h"
#include "../../runtimes/cpp/src/generation.h"

namespace {

using Clock = std::chrono::steady_clock;

double microseconds(Clock::duration time) { return std::chrono::duration<double, std::micro>(time).count(); }

// Counts what another backend's steps take.
class Timed : public mythos::Backend {
 public:
  explicit Timed(std::unique_ptr<mythos::Backend> inner) : inner_(std::move(inner)) {}
  const char* name() const override { return inner_->name(); }
  const mythos::Graph& graph() const override { return inner_->graph(); }
  bool native() const override { return inner_->native(); }
  int64_t longest_step() const override { return inner_->longest_step(); }
  std::unique_ptr<mythos::StepOutput> run(const mythos::StepInput& step, mythos::StopSignal& stop) override {
    const auto began = Clock::now();
    auto out = inner_->run(step, stop);
    inside = microseconds(Clock::now() - began);
    return out;
  }

  double inside = 0;  // of the last step

 private:
  std::unique_ptr<mythos::Backend> inner_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s BUNDLE [TOKENS [TEMPERATURE [THREADS [TOP_K [TOP_P]]]]]\n", argv[0]);
    return 2;
  }
  const auto manifest = mythos::open_bundle(argv[1]);
  const auto text = mythos::open_text(argv[1], manifest.tokenizer);
  Timed backend(mythos::open_onnxruntime(argv[1], manifest, {argc > 4 ? std::atoi(argv[4]) : 0, -1, "", 0}));
  mythos::MemoryBudget budget(0);
  mythos::Request request;
  request.max_new_tokens = argc > 2 ? std::atoll(argv[2]) : 400;
  request.sampling.temperature = argc > 3 ? std::atof(argv[3]) : 0;
  request.sampling.top_k = argc > 5 ? std::atoll(argv[5]) : 0;
  request.sampling.top_p = argc > 6 ? std::atof(argv[6]) : 1;
  std::vector<double> outside;
  auto last = Clock::now();
  mythos::generate(backend, budget, text.tokenizer.get(), {{5, 6, 7}}, request, [&](const mythos_token&) {
    const auto now = Clock::now();
    outside.push_back(microseconds(now - last) - backend.inside);
    last = now;
    return true;
  });
  outside.erase(outside.begin());  // loading, and the prompt
  std::sort(outside.begin(), outside.end());
  std::printf("%s operators, %zu tokens: p50 %.1f us, p99 %.1f us\n", backend.native() ? "native" : "portable", outside.size(),
              outside[outside.size() / 2], outside[outside.size() * 99 / 100]);
}
