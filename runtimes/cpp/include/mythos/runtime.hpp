// The Runner in C++17: mythos/runtime.h with ownership, exceptions and standard containers. Header-only: what crosses the library's
// border is C.
//
// Every function throws mythos::Error where the C function fails. Threads and lifetimes are those of runtime.h.
#ifndef MYTHOS_RUNTIME_HPP
#define MYTHOS_RUNTIME_HPP

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mythos/runtime.h"

namespace mythos {

// What a C function returned, with its message.
class Error : public std::runtime_error {
 public:
  explicit Error(mythos_status status) : std::runtime_error(mythos_last_error()), status_(status) {}
  mythos_status status() const noexcept { return status_; }

 private:
  mythos_status status_;
};

namespace detail {

inline void check(mythos_status status) {
  if (status != MYTHOS_OK) throw Error(status);
}

struct Close {
  void operator()(mythos_runner* runner) const noexcept { mythos_runner_close(runner); }
  void operator()(mythos_session* session) const noexcept { mythos_session_close(session); }
  void operator()(mythos_text_stream* stream) const noexcept { mythos_text_stream_close(stream); }
};

// Rows of ids as the C functions take them; the rows must outlive it.
struct Rows {
  explicit Rows(const std::vector<std::vector<int64_t>>& rows) {
    for (const auto& row : rows) {
      ids.push_back(row.data());
      lengths.push_back(row.size());
    }
  }
  std::vector<const int64_t*> ids;
  std::vector<std::size_t> lengths;
};

}  // namespace detail

using Ids = std::vector<int64_t>;
using Token = mythos_token;

// How to load; see mythos_options.
struct Options {
  int32_t threads = 0;
  int32_t native = -1;
  std::string operators_library;
  uint64_t memory_limit = 0;
  int64_t prefill_chunk = 0;
};

// How to generate; see mythos_request.
struct Request {
  int64_t max_new_tokens = 128;
  double temperature = 0;
  int64_t top_k = 0;
  double top_p = 1, min_p = 0, repetition_penalty = 1;
  uint64_t seed = 0;
  Ids stop_ids;
  bool ignore_eos = false;
  Ids n_loops;  // of each sequence; empty: the trained depth
  std::vector<std::string> stop_texts;
};

// What was generated after each prompt. cancelled: a callback stopped it.
struct Generated {
  std::vector<Ids> ids;
  std::vector<std::string> texts;  // empty where the bundle's tokenizer cannot be used
  std::vector<mythos_finish> finish;
  mythos_stats stats{};
  bool cancelled = false;

  std::string stats_json() const {
    std::string text(mythos_stats_json(&stats, nullptr, 0) + 1, '\0');
    mythos_stats_json(&stats, text.data(), text.size());
    text.pop_back();
    return text;
  }
};

// Sequences that grow together; made by Runner::session, which must outlive it.
class Session {
 public:
  // Logits [B, V] after the last token of each row; exit_loop [B].
  struct Step {
    std::vector<float> logits;
    Ids exit_loop;
  };

  int64_t batch() const noexcept { return batch_; }

  Step advance(const std::vector<Ids>& ids) {
    if (ids.size() != static_cast<std::size_t>(batch_)) throw std::invalid_argument("one row of ids for each sequence is expected");
    const detail::Rows rows(ids);
    Step step{std::vector<float>(static_cast<std::size_t>(batch_ * vocab_size_)), Ids(static_cast<std::size_t>(batch_))};
    detail::check(
        mythos_session_advance(session_.get(), rows.ids.data(), rows.lengths.data(), step.logits.data(), step.exit_loop.data()));
    return step;
  }

  Ids past_len() const {
    Ids length(static_cast<std::size_t>(batch_));
    detail::check(mythos_session_past_len(session_.get(), length.data()));
    return length;
  }

  void lower_n_loops(const Ids& n_loops) {
    if (n_loops.size() != static_cast<std::size_t>(batch_)) throw std::invalid_argument("one depth for each sequence is expected");
    detail::check(mythos_session_lower_n_loops(session_.get(), n_loops.data()));
  }

  void keep(const Ids& rows) {
    detail::check(mythos_session_keep(session_.get(), rows.data(), rows.size()));
    batch_ = static_cast<int64_t>(rows.size());
  }

  // From any thread.
  void cancel() noexcept { mythos_session_cancel(session_.get()); }
  void resume() { detail::check(mythos_session_resume(session_.get())); }

 private:
  friend class Runner;
  Session(mythos_session* session, int64_t batch, int64_t vocab_size)
      : session_(session), batch_(batch), vocab_size_(vocab_size) {}

  std::unique_ptr<mythos_session, detail::Close> session_;
  int64_t batch_, vocab_size_;
};

// Text that grows token by token; made by Runner::text_stream, which must outlive it.
class TextStream {
 public:
  // What a token adds: whole characters, "" while one is unfinished. last: nothing follows.
  std::string add(int64_t id, bool last = false) {
    const char* text = nullptr;
    std::size_t size = 0;
    detail::check(mythos_text_stream_add(stream_.get(), id, last ? 1 : 0, &text, &size));
    return {text, size};
  }

 private:
  friend class Runner;
  explicit TextStream(mythos_text_stream* stream) : stream_(stream) {}

  std::unique_ptr<mythos_text_stream, detail::Close> stream_;
};

// A loaded bundle.
class Runner {
 public:
  explicit Runner(const std::string& bundle, const Options& options = {}) {
    mythos_options plain;
    mythos_options_init(&plain);
    plain.threads = options.threads;
    plain.native = options.native;
    plain.operators_library = options.operators_library.empty() ? nullptr : options.operators_library.c_str();
    plain.memory_limit = options.memory_limit;
    plain.prefill_chunk = options.prefill_chunk;
    mythos_runner* runner = nullptr;
    detail::check(mythos_runner_open(bundle.c_str(), &plain, &runner));
    runner_.reset(runner);
  }

  mythos_info info() const {
    mythos_info info{};
    info.size = sizeof(info);
    detail::check(mythos_runner_info(runner_.get(), &info));
    return info;
  }

  // n_loops: of each sequence; empty: the trained depth.
  Session session(int64_t batch = 1, const Ids& n_loops = {}) {
    if (!n_loops.empty() && n_loops.size() != static_cast<std::size_t>(batch))
      throw std::invalid_argument("one depth for each sequence is expected");
    mythos_session* session = nullptr;
    detail::check(mythos_session_open(runner_.get(), batch, n_loops.empty() ? nullptr : n_loops.data(), &session));
    return Session(session, batch, info().vocab_size);
  }

  // tell: is given every token as it comes, and stops the generation by returning false. What it throws is thrown again here.
  Generated generate(const std::vector<Ids>& prompts, const Request& request = {},
                     const std::function<bool(const Token&)>& tell = nullptr) {
    if (!request.n_loops.empty() && request.n_loops.size() != prompts.size())
      throw std::invalid_argument("one depth for each prompt is expected");
    mythos_request plain;
    mythos_request_init(&plain);
    plain.max_new_tokens = request.max_new_tokens;
    plain.temperature = request.temperature;
    plain.top_k = request.top_k;
    plain.top_p = request.top_p;
    plain.min_p = request.min_p;
    plain.repetition_penalty = request.repetition_penalty;
    plain.seed = request.seed;
    plain.stop_ids = request.stop_ids.data();
    plain.n_stop_ids = request.stop_ids.size();
    plain.ignore_eos = request.ignore_eos ? 1 : 0;
    plain.n_loops = request.n_loops.empty() ? nullptr : request.n_loops.data();
    std::vector<const char*> stop_texts;
    for (const auto& text : request.stop_texts) stop_texts.push_back(text.c_str());
    plain.stop_texts = stop_texts.data();
    plain.n_stop_texts = stop_texts.size();
    Listener listener{&tell, Generated{}, nullptr};
    listener.generated.ids.resize(prompts.size());
    listener.generated.texts.resize(prompts.size());
    listener.generated.finish.resize(prompts.size());
    listener.generated.stats.size = sizeof(mythos_stats);
    const detail::Rows rows(prompts);
    const mythos_status status =
        mythos_generate(runner_.get(), rows.ids.data(), rows.lengths.data(), static_cast<int64_t>(prompts.size()), &plain,
                        &Listener::heard, &listener, listener.generated.finish.data(), &listener.generated.stats);
    if (listener.thrown) std::rethrow_exception(listener.thrown);
    listener.generated.cancelled = status == MYTHOS_CANCELLED;
    if (!listener.generated.cancelled) detail::check(status);
    return std::move(listener.generated);
  }

  // Bytes that a step must read and write; see mythos_step_bytes.
  double step_bytes(int64_t batch, int64_t tokens, double past_len, int64_t n_loops = 0) const {
    double bytes = 0;
    detail::check(mythos_step_bytes(runner_.get(), batch, tokens, past_len, n_loops, &bytes));
    return bytes;
  }

  // Natural log-probability of every token after the first. n_loops: 0 for the trained depth.
  std::vector<double> score(const Ids& ids, int64_t n_loops = 0) {
    std::vector<double> logprobs(ids.empty() ? 0 : ids.size() - 1);
    detail::check(mythos_score(runner_.get(), ids.data(), ids.size(), n_loops, logprobs.data()));
    return logprobs;
  }

  Ids encode(const std::string& text) const {
    Ids ids(text.size() + 1);  // no token is shorter than a byte, but a tokenizer may put a space in front
    std::size_t n = 0;
    detail::check(mythos_encode(runner_.get(), text.data(), text.size(), ids.data(), ids.size(), &n));
    ids.resize(n);
    return ids;
  }

  std::string decode(const Ids& ids) const {
    std::size_t size = 0;
    detail::check(mythos_decode(runner_.get(), ids.data(), ids.size(), nullptr, 0, &size));
    std::string text(size, '\0');
    detail::check(mythos_decode(runner_.get(), ids.data(), ids.size(), text.data(), text.size(), &size));
    return text;
  }

  TextStream text_stream() const {
    mythos_text_stream* stream = nullptr;
    detail::check(mythos_text_stream_open(runner_.get(), &stream));
    return TextStream(stream);
  }

 private:
  struct Listener {
    const std::function<bool(const Token&)>* tell;
    Generated generated;
    std::exception_ptr thrown;

    static int32_t heard(const mythos_token* token, void* user) {
      auto& self = *static_cast<Listener*>(user);
      try {
        self.generated.ids[static_cast<std::size_t>(token->index)].push_back(token->id);
        self.generated.texts[static_cast<std::size_t>(token->index)].append(token->text, token->text_size);
        return !*self.tell || (*self.tell)(*token) ? 0 : 1;
      } catch (...) {
        self.thrown = std::current_exception();
        return 1;
      }
    }
  };

  std::unique_ptr<mythos_runner, detail::Close> runner_;
};

}  // namespace mythos

#endif
