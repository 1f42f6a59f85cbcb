// Generating: a loop of session steps and choices, as in runtimes/generation.py.
#pragma once

#include <functional>
#include <set>
#include <vector>

#include "mythos/runtime.h"
#include "sampling.h"
#include "session.h"
#include "tokenizer.h"

namespace mythos {

struct Request {
  int64_t max_new_tokens = 128;
  Sampling sampling;
  uint64_t seed = 0;
  std::set<int64_t> stop_ids, eos;
  std::vector<std::string> stop_texts;  // only with a tokenizer
  std::vector<int64_t> n_loops;
};

struct Generated {
  std::vector<mythos_finish> finish;  // one a sequence
  mythos_stats stats;
  bool cancelled;
};

// tokenizer: gives tokens their text; may be null. tell: is given every token; where it returns false, the generation stops. Throws Error.
Generated generate(Backend& backend, MemoryBudget& budget, const Tokenizer* tokenizer, const Rows& prompts, const Request& request,
                   const std::function<bool(const mythos_token&)>& tell);

}  // namespace mythos
