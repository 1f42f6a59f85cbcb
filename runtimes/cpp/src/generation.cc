#include "generation.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "error.h"

namespace mythos {
namespace {

struct Sequence {
  int64_t index;
  std::vector<int64_t> seen;
  SplitMix64 random;
  TextStream stream;
  int64_t n_new;
  mythos_finish finish;
  mythos_token token;  // the newest
  std::string text;    // its text
};

mythos_finish finish_after(const Sequence& sequence, const Request& request, int64_t max_seq_len) {
  const int64_t token = sequence.seen.back();
  if (request.eos.count(token)) return MYTHOS_FINISH_EOS;
  if (request.stop_ids.count(token)) return MYTHOS_FINISH_STOP;
  if (sequence.n_new >= request.max_new_tokens) return MYTHOS_FINISH_LENGTH;
  if (static_cast<int64_t>(sequence.seen.size()) > max_seq_len) return MYTHOS_FINISH_CONTEXT;
  return MYTHOS_FINISH_NONE;
}

double seconds_since(std::chrono::steady_clock::time_point began) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

// Chooses the sequence's next token from logits [V].
void choose(Sequence& sequence, const float* logits, const Graph& graph, const Request& request, Scratch& scratch) {
  const int64_t token = request.sampling.choose(logits, graph.vocab_size, sequence.seen, sequence.random, scratch);
  sequence.seen.push_back(token);
  ++sequence.n_new;
  sequence.finish = finish_after(sequence, request, graph.max_seq_len);
  sequence.text = sequence.stream.add(token, sequence.finish != MYTHOS_FINISH_NONE);
  if (sequence.stream.stopped()) sequence.finish = MYTHOS_FINISH_STOP;
  sequence.token = {token, log_probability(logits, graph.vocab_size, token), sequence.index, nullptr, sequence.text.size()};
}

// Takes out the sequences that have ended; step: what the others go on with.
void leave(std::vector<Sequence>& sequences, Generated& result, Session& session, Rows& step) {
  std::vector<int64_t> going;
  std::vector<Sequence> left;
  step.clear();
  for (size_t b = 0; b < sequences.size(); ++b) {
    Sequence& sequence = sequences[b];
    if (result.cancelled && sequence.finish == MYTHOS_FINISH_NONE) sequence.finish = MYTHOS_FINISH_CANCELLED;
    result.finish[static_cast<size_t>(sequence.index)] = sequence.finish;
    if (sequence.finish != MYTHOS_FINISH_NONE) continue;
    going.push_back(static_cast<int64_t>(b));
    step.push_back({sequence.seen.back()});
    left.push_back(std::move(sequence));
  }
  if (!left.empty() && left.size() < sequences.size()) session.keep(going);
  sequences.swap(left);
}

}  // namespace

Generated generate(Backend& backend, MemoryBudget& budget, const Tokenizer* tokenizer, const Rows& prompts, const Request& request,
                   const std::function<bool(const mythos_token&)>& tell) {
  if (request.max_new_tokens < 1)
    refuse("max_new_tokens is " + std::to_string(request.max_new_tokens) + "; expected at least 1");
  request.sampling.check();
  const Graph& graph = backend.graph();
  size_t longest = 0;
  for (const auto& prompt : prompts) longest = std::max(longest, prompt.size());
  const auto expected = std::min(static_cast<int64_t>(longest), graph.max_seq_len) + std::min(request.max_new_tokens, graph.max_seq_len);
  Session session(backend, budget, static_cast<int64_t>(prompts.size()), request.n_loops, expected);
  std::vector<Sequence> sequences;
  Generated result{std::vector<mythos_finish>(prompts.size(), MYTHOS_FINISH_NONE), mythos_stats{}, false};
  for (size_t i = 0; i < prompts.size(); ++i) {
    sequences.push_back(
        {static_cast<int64_t>(i), prompts[i], SplitMix64(request.seed + i), TextStream(tokenizer, request.stop_texts), 0,
         MYTHOS_FINISH_NONE, mythos_token{}, ""});
    result.stats.prompt_tokens += static_cast<int64_t>(prompts[i].size());
  }
  std::vector<float> logits(prompts.size() * static_cast<size_t>(graph.vocab_size));
  std::vector<int64_t> exit_loop(prompts.size());
  Rows step = prompts;
  Scratch scratch;
  double exit_loops = 0;
  for (bool decoding = false; !sequences.empty(); decoding = true) {
    const auto began = std::chrono::steady_clock::now();
    session.advance(step, logits.data(), exit_loop.data());
    for (size_t b = 0; b < sequences.size(); ++b) {
      choose(sequences[b], logits.data() + b * static_cast<size_t>(graph.vocab_size), graph, request, scratch);
      exit_loops += static_cast<double>(exit_loop[b]);
    }
    const int64_t made = static_cast<int64_t>(sequences.size());
    (decoding ? result.stats.decode_seconds : result.stats.prefill_seconds) += seconds_since(began);
    result.stats.decode_tokens += decoding ? made : 0;
    result.stats.new_tokens += made;
    for (Sequence& sequence : sequences) {
      sequence.token.text = sequence.text.c_str();
      result.cancelled = result.cancelled || !tell(sequence.token);
    }
    leave(sequences, result, session, step);
  }
  result.stats.mean_exit_loop = exit_loops / static_cast<double>(result.stats.new_tokens);
  return result;
}

}  // namespace mythos
