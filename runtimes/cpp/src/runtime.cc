// The C functions: arguments checked, exceptions turned into a status and a message of the calling thread.
#include "mythos/runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>

#include "error.h"
#include "footprint.h"
#include "generation.h"
#include "utf8.h"

struct mythos_runner {
  std::unique_ptr<mythos::Backend> backend;
  mythos::MemoryBudget budget;
  mythos::Manifest manifest;
  uint64_t weight_bytes;
  mythos::Text text;
};

struct mythos_session {
  mythos::Session session;
};

struct mythos_text_stream {
  mythos::TextStream stream;
  std::string text;  // of the last token
};

namespace {

using mythos::refuse;

std::string& message() {
  thread_local std::string text;
  return text;
}

template <typename Call>
mythos_status guarded(Call call) {
  try {
    message().clear();
    return call();
  } catch (const mythos::Error& error) {
    message() = error.what();
    return error.status;
  } catch (const std::bad_alloc&) {
    message() = "out of memory; close sessions or shorten them";
    return MYTHOS_ERROR_MEMORY;
  } catch (const std::exception& error) {
    message() = std::string("internal error: ") + error.what();
    return MYTHOS_ERROR_INTERNAL;
  } catch (...) {
    message() = "internal error";
    return MYTHOS_ERROR_INTERNAL;
  }
}

template <typename Pointer>
void need(const Pointer* pointer, const char* name) {
  if (!pointer) refuse(std::string(name) + " is NULL");
}

// A caller's struct as this library knows it: what an older header lacks has its default.
template <typename Struct>
Struct filled(const Struct* given, void (*init)(Struct*), const char* name) {
  Struct known;
  init(&known);
  if (!given) return known;
  if (given->size < sizeof(size_t) || given->size > 4096)
    refuse(std::string(name) + ".size is " + std::to_string(given->size) + "; set it by its _init function");
  const size_t own = known.size;
  std::memcpy(&known, given, std::min(own, given->size));
  known.size = own;
  return known;
}

// Copies as much of a result as the caller's struct has room for.
template <typename Struct>
void hand_out(Struct result, Struct* to, const char* name) {
  const size_t room = to->size;
  if (room < sizeof(size_t) || room > 4096) refuse(std::string(name) + ".size is " + std::to_string(room) + "; set it to sizeof");
  result.size = room;
  std::memcpy(to, &result, std::min(room, sizeof(Struct)));
}

mythos::Rows rows_of(const int64_t* const* ids, const size_t* lengths, int64_t batch) {
  need(ids, "ids");
  need(lengths, "lengths");
  mythos::Rows rows;
  for (int64_t b = 0; b < batch; ++b) {
    if (lengths[b]) need(ids[b], "a row of ids");
    rows.emplace_back(ids[b], ids[b] + lengths[b]);
  }
  return rows;
}

// As many of the values as there is room for; n: how many there are.
template <typename Values, typename Value>
void hand_out_all(const Values& values, Value* to, size_t room, size_t* n) {
  if (room) need(to, "the place for the result");
  std::copy_n(values.begin(), std::min(room, values.size()), to);
  *n = values.size();
}

// Stop texts of a request, and the ids of those that name a special token, which never shows as text.
void add_stops(const mythos_request& wanted, const mythos::Text& text, mythos::Request& request) {
  if (wanted.n_stop_ids) need(wanted.stop_ids, "stop_ids");
  if (wanted.n_stop_texts) need(wanted.stop_texts, "stop_texts");
  request.stop_ids.insert(wanted.stop_ids, wanted.stop_ids + wanted.n_stop_ids);
  for (size_t i = 0; i < wanted.n_stop_texts; ++i) {
    need(wanted.stop_texts[i], "a text of stop_texts");
    const std::string stop = wanted.stop_texts[i];
    const auto special = text.need().special(stop);
    if (stop.empty()) refuse("a text of stop_texts is empty; leave it out");
    if (special)
      request.stop_ids.insert(*special);
    else
      request.stop_texts.push_back(stop);
  }
}

std::vector<int64_t> depths(const int64_t* n_loops, int64_t batch) {
  return n_loops ? std::vector<int64_t>(n_loops, n_loops + batch) : std::vector<int64_t>();
}

}  // namespace

extern "C" {

uint32_t mythos_abi_version(void) { return MYTHOS_ABI_VERSION; }
const char* mythos_version(void) { return MYTHOS_VERSION; }
const char* mythos_last_error(void) { return message().c_str(); }

void mythos_options_init(mythos_options* options) {
  if (!options) return;
  *options = mythos_options{sizeof(mythos_options), 0, -1, nullptr, 0, 0};
}

mythos_status mythos_runner_open(const char* bundle, const mythos_options* options, mythos_runner** runner) {
  return guarded([&] {
    need(bundle, "bundle");
    need(runner, "runner");
    *runner = nullptr;
    const mythos_options chosen = filled(options, mythos_options_init, "options");
    if (chosen.threads < 0) refuse("threads is " + std::to_string(chosen.threads) + "; expected 0 (all cores) or more");
    if (chosen.prefill_chunk < 0)
      refuse("prefill_chunk is " + std::to_string(chosen.prefill_chunk) + "; expected 0 (as many as suit the weights) or more");
    const auto manifest = mythos::open_bundle(bundle);
    auto text = mythos::open_text(bundle, manifest.tokenizer);
    auto backend = mythos::open_onnxruntime(
        bundle, manifest, {chosen.threads, chosen.native, chosen.operators_library ? chosen.operators_library : "",
                          chosen.prefill_chunk, chosen.memory_limit});
    const uint64_t in_memory = manifest.weight_memory(backend->graph()), in_files = manifest.weight_bytes(backend->graph());
    const uint64_t left = chosen.memory_limit ? std::max<uint64_t>(chosen.memory_limit - in_memory, 1) : 0;
    *runner = new mythos_runner{std::move(backend), mythos::MemoryBudget(left), manifest, in_files, std::move(text)};
    return MYTHOS_OK;
  });
}

void mythos_runner_close(mythos_runner* runner) { delete runner; }

mythos_status mythos_runner_info(const mythos_runner* runner, mythos_info* info) {
  return guarded([&] {
    need(runner, "runner");
    need(info, "info");
    const mythos::Graph& graph = runner->backend->graph();
    const int64_t loops = graph.loops.value_or(graph.default_loops);
    hand_out(mythos_info{sizeof(mythos_info), graph.vocab_size, graph.max_seq_len, graph.loops.value_or(0), graph.max_loops, loops,
                         graph.slots(loops) * static_cast<int64_t>(graph.cache_row_size()), runner->weight_bytes,
                         runner->backend->native() ? 1 : 0, runner->backend->name(), runner->text.tokenizer ? 1 : 0,
                         graph.window},
             info, "info");
    return MYTHOS_OK;
  });
}

mythos_status mythos_step_bytes(const mythos_runner* runner, int64_t batch, int64_t tokens, double past_len, int64_t n_loops, double* bytes) {
  return guarded([&] {
    need(runner, "runner");
    need(bytes, "bytes");
    if (batch < 1 || tokens < 1 || !(past_len >= 0))
      refuse("batch is " + std::to_string(batch) + ", tokens " + std::to_string(tokens) + " and past_len " + std::to_string(past_len) +
             "; expected at least 1, 1 and 0");
    const mythos::Graph& graph = runner->backend->graph();
    const int64_t loops = n_loops ? n_loops : graph.loops.value_or(graph.default_loops);
    mythos::check_n_loops(graph, {loops});
    const auto sequences = static_cast<double>(batch), each = static_cast<double>(tokens);
    const double rows = graph.window ? std::min(past_len, static_cast<double>(graph.window)) : past_len;
    *bytes = mythos::weight_bytes_read(runner->manifest, loops, sequences * each) +
             sequences * (rows + each) * static_cast<double>(graph.slots(loops)) * static_cast<double>(graph.cache_row_size());
    return MYTHOS_OK;
  });
}

mythos_status mythos_session_open(mythos_runner* runner, int64_t batch, const int64_t* n_loops, mythos_session** session) {
  return guarded([&] {
    need(runner, "runner");
    need(session, "session");
    *session = nullptr;
    *session = new mythos_session{{*runner->backend, runner->budget, batch, depths(n_loops, batch)}};
    return MYTHOS_OK;
  });
}

void mythos_session_close(mythos_session* session) { delete session; }

mythos_status mythos_session_advance(mythos_session* session, const int64_t* const* ids, const size_t* lengths, float* logits,
                                     int64_t* exit_loop) {
  return guarded([&] {
    need(session, "session");
    session->session.advance(rows_of(ids, lengths, session->session.batch()), logits, exit_loop);
    return MYTHOS_OK;
  });
}

mythos_status mythos_session_past_len(const mythos_session* session, int64_t* past_len) {
  return guarded([&] {
    need(session, "session");
    need(past_len, "past_len");
    const auto& length = session->session.past_len();
    std::copy(length.begin(), length.end(), past_len);
    return MYTHOS_OK;
  });
}

mythos_status mythos_session_lower_n_loops(mythos_session* session, const int64_t* n_loops) {
  return guarded([&] {
    need(session, "session");
    need(n_loops, "n_loops");
    session->session.lower_n_loops(depths(n_loops, session->session.batch()));
    return MYTHOS_OK;
  });
}

mythos_status mythos_session_keep(mythos_session* session, const int64_t* rows, size_t count) {
  return guarded([&] {
    need(session, "session");
    need(rows, "rows");
    session->session.keep(std::vector<int64_t>(rows, rows + count));
    return MYTHOS_OK;
  });
}

void mythos_session_cancel(mythos_session* session) {
  if (session) session->session.stop().set();
}

mythos_status mythos_session_resume(mythos_session* session) {
  return guarded([&] {
    need(session, "session");
    session->session.stop().reset();
    return MYTHOS_OK;
  });
}

void mythos_request_init(mythos_request* request) {
  if (!request) return;
  *request = mythos_request{sizeof(mythos_request), 128, 0.0, 0, 1.0, 0.0, 1.0, 0, nullptr, 0, 0, nullptr, nullptr, 0};
}

mythos_status mythos_generate(mythos_runner* runner, const int64_t* const* prompts, const size_t* lengths, int64_t batch,
                              const mythos_request* request, mythos_token_callback callback, void* user, mythos_finish* finish,
                              mythos_stats* stats) {
  return guarded([&] {
    need(runner, "runner");
    if (batch < 1) refuse("batch is " + std::to_string(batch) + "; expected at least 1");
    const mythos_request wanted = filled(request, mythos_request_init, "request");
    mythos::Request plain;
    plain.max_new_tokens = wanted.max_new_tokens;
    plain.sampling = {wanted.temperature, wanted.top_p, wanted.min_p, wanted.repetition_penalty, wanted.top_k};
    plain.seed = wanted.seed;
    add_stops(wanted, runner->text, plain);
    const auto& eos = runner->manifest.eos_token_ids;
    if (!wanted.ignore_eos) plain.eos.insert(eos.begin(), eos.end());
    plain.n_loops = depths(wanted.n_loops, batch);
    const auto result =
        mythos::generate(*runner->backend, runner->budget, runner->text.tokenizer.get(), rows_of(prompts, lengths, batch), plain,
                         [&](const mythos_token& token) { return !callback || callback(&token, user) == 0; });
    if (finish) std::copy(result.finish.begin(), result.finish.end(), finish);
    if (stats) hand_out(result.stats, stats, "stats");
    if (result.cancelled) message() = "the callback stopped the generation";
    return result.cancelled ? MYTHOS_CANCELLED : MYTHOS_OK;
  });
}

mythos_status mythos_score(mythos_runner* runner, const int64_t* ids, size_t n, int64_t n_loops, double* logprobs) {
  return guarded([&] {
    need(runner, "runner");
    need(ids, "ids");
    need(logprobs, "logprobs");
    if (n < 2) refuse("ids holds " + std::to_string(n) + " tokens; expected at least 2");
    mythos::Session session(*runner->backend, runner->budget, 1, n_loops ? std::vector<int64_t>{n_loops} : std::vector<int64_t>{},
                            static_cast<int64_t>(n));
    const int64_t vocab = runner->backend->graph().vocab_size;
    session.advance_scored({ids, ids + n}, [&](const float* logits, size_t i) {
      if (i + 1 < n) logprobs[i] = mythos::log_probability(logits, vocab, ids[i + 1]);
    });
    return MYTHOS_OK;
  });
}

mythos_status mythos_encode(const mythos_runner* runner, const char* text, size_t size, int64_t* ids, size_t room, size_t* n) {
  return guarded([&] {
    need(runner, "runner");
    need(n, "n");
    if (size) need(text, "text");
    hand_out_all(runner->text.need().encode({text, size}), ids, room, n);
    return MYTHOS_OK;
  });
}

mythos_status mythos_decode(const mythos_runner* runner, const int64_t* ids, size_t n, char* text, size_t room, size_t* size) {
  return guarded([&] {
    need(runner, "runner");
    need(size, "size");
    if (n) need(ids, "ids");
    std::string bytes;
    for (size_t i = 0; i < n; ++i) bytes += runner->text.need().bytes(ids[i]);
    hand_out_all(mythos::readable_utf8(bytes), text, room, size);
    return MYTHOS_OK;
  });
}

mythos_status mythos_text_stream_open(const mythos_runner* runner, mythos_text_stream** stream) {
  return guarded([&] {
    need(runner, "runner");
    need(stream, "stream");
    *stream = nullptr;
    *stream = new mythos_text_stream{mythos::TextStream(&runner->text.need(), {}), ""};
    return MYTHOS_OK;
  });
}

void mythos_text_stream_close(mythos_text_stream* stream) { delete stream; }

mythos_status mythos_text_stream_add(mythos_text_stream* stream, int64_t id, int32_t last, const char** text, size_t* size) {
  return guarded([&] {
    need(stream, "stream");
    need(text, "text");
    need(size, "size");
    stream->text = stream->stream.add(id, last != 0);
    *text = stream->text.c_str();
    *size = stream->text.size();
    return MYTHOS_OK;
  });
}

size_t mythos_stats_json(const mythos_stats* stats, char* text, size_t room) {
  if (!stats) return 0;
  const double prefill = stats->prefill_seconds, decode = stats->decode_seconds;
  const int length = std::snprintf(
      text, text ? room : 0,
      "{\"prompt_tokens\": %lld, \"new_tokens\": %lld, \"prefill_seconds\": %.9g, \"decode_seconds\": %.9g, "
      "\"prefill_tokens_per_second\": %.9g, \"decode_tokens_per_second\": %.9g, \"mean_exit_loop\": %.9g}",
      static_cast<long long>(stats->prompt_tokens), static_cast<long long>(stats->new_tokens), prefill, decode,
      prefill > 0 ? static_cast<double>(stats->prompt_tokens) / prefill : 0.0,
      decode > 0 ? static_cast<double>(stats->decode_tokens) / decode : 0.0, stats->mean_exit_loop);
  return length > 0 ? static_cast<size_t>(length) : 0;
}

}  // extern "C"
