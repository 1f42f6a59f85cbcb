// What runs a bundle's graph: onnxruntime here, others to come.
//
// Shape letters: B batch, S new tokens, K positions with logits, C capacity and W width of the cache, V vocab_size.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.h"

namespace mythos {

// Asks a running step to end, from any thread.
class StopSignal {
 public:
  bool is_set() const { return set_.load(); }
  void set();
  void reset() { set_.store(false); }
  // What ends the step about to run, while it runs.
  class Step {
   public:
    Step(StopSignal& signal, std::function<void()> stop);
    ~Step();

   private:
    StopSignal& signal_;
  };

 private:
  std::atomic<bool> set_{false};
  std::mutex mutex_;
  std::function<void()> stop_;
};

// One evaluation of the graph. Pointers are read during the call only.
struct StepInput {
  int64_t batch, seq, capacity, slots, k;
  const int64_t* input_ids;        // [B, S]
  const int64_t* past_len;         // [B]
  const void* past_kv;             // [slots, B, C, W] in the cache's dtype
  const float* past_scale;         // [slots, B, C] of an int8 cache
  const int64_t* logit_positions;  // [B, K]
  const int64_t* n_loops;          // [B]
};

// Where a backend put its outputs; they live until this is destroyed.
class StepOutput {
 public:
  virtual ~StepOutput() = default;
  virtual const float* logits() const = 0;       // [B, K, V]
  virtual const void* new_kv() const = 0;        // [slots, B, S, W]
  virtual const int64_t* exit_loop() const = 0;  // [B, S]
  virtual const float* new_scale() const = 0;    // [slots, B, S] of an int8 cache, else null
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;
  virtual const Graph& graph() const = 0;
  virtual bool native() const = 0;
  // Tokens of each sequence that a step is to take at most: bounds the memory of scores and expert inputs.
  virtual int64_t longest_step() const = 0;
  // Throws Error: MYTHOS_CANCELLED where the signal is set before or during the step, else what failed.
  virtual std::unique_ptr<StepOutput> run(const StepInput& step, StopSignal& stop) = 0;
};

struct BackendOptions {
  int threads;            // 0: all cores
  int native;             // 1, 0 or -1, as in mythos_options
  std::string operators;  // path of the native operators, "" for the usual places
  int64_t longest_step;   // 0: as suits the weights
  uint64_t memory_limit;  // for weights; 0: none
};

// Throws Error.
std::unique_ptr<Backend> open_onnxruntime(const std::filesystem::path& folder, const Manifest& manifest, const BackendOptions& options);

}  // namespace mythos
