/* The Runner in C: runs a bundle of mythos-export on onnxruntime, without Python.
 *
 * Ownership: what an `_open` function returns is the caller's until the matching `_close`. Strings that functions return belong to
 * the library; how long they live is said with each. Arrays that are passed in are read during the call only.
 * Threads: a runner may be used by any number of threads at once. A session belongs to one thread at a time;
 * mythos_session_cancel alone may be called from another. mythos_last_error is the calling thread's.
 * Errors: functions return a mythos_status; what went wrong, with its fix, is in mythos_last_error. After an error a session is as it was
 * before the call and stays usable. No exception leaves the library.
 * ABI: structs that the caller fills begin with their size (`sizeof`), set by their `_init` function; a newer library takes the structs of an
 * older header. Shape letters: B sequences of a session, V vocab_size.
 */
#ifndef MYTHOS_RUNTIME_H
#define MYTHOS_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MYTHOS_API
#else
#define MYTHOS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MYTHOS_ABI_VERSION 1

/* What a call came to. */
typedef enum mythos_status {
  MYTHOS_OK = 0,
  MYTHOS_CANCELLED = 1,     /* stopped by mythos_session_cancel or by a callback: no error */
  MYTHOS_ERROR_INPUT = 2,   /* an argument that makes no sense; nothing was done */
  MYTHOS_ERROR_BUNDLE = 3,  /* a bundle that is damaged, incomplete or of another format */
  MYTHOS_ERROR_BACKEND = 4, /* onnxruntime cannot be set up, or failed */
  MYTHOS_ERROR_MEMORY = 5,  /* the memory limit, or what the system has */
  MYTHOS_ERROR_INTERNAL = 6 /* a defect of this library; please report it */
} mythos_status;

/* MYTHOS_ABI_VERSION of the library that is loaded. */
MYTHOS_API uint32_t mythos_abi_version(void);

/* Release of the library, like "0.1.0"; lives as long as the library. */
MYTHOS_API const char* mythos_version(void);

/* Why the calling thread's last call failed, in English, with the fix; "" after a call that succeeded. Lives until the thread's next
 * call. */
MYTHOS_API const char* mythos_last_error(void);

/* ---- A loaded bundle ---- */

typedef struct mythos_runner mythos_runner;

/* How to load. Fill with mythos_options_init, then change what you want. */
typedef struct mythos_options {
  size_t size;
  int32_t threads;                /* CPU threads of a step; 0: all cores */
  int32_t native;                 /* native operators: 1 must run, 0 must not, -1 where operators_library loads (the default) */
  const char* operators_library;  /* path of libmythos_ops.so; NULL: beside this library, or what MYTHOS_OPERATORS names */
  uint64_t memory_limit;          /* most bytes for weights and all caches together, as they lie in memory (16-bit weights are widened);
                                   * 0: no limit. What a step computes comes on top */
  int64_t prefill_chunk;          /* tokens of each sequence that a step takes at most; 0: 512, or 256 where the weights take less than
                                   * 1 GiB. Fewer take less memory beside weights and caches, and prefill longer */
} mythos_options;

MYTHOS_API void mythos_options_init(mythos_options* options);

/* What a bundle holds. */
typedef struct mythos_info {
  size_t size;
  int64_t vocab_size;    /* V */
  int64_t max_seq_len;   /* most tokens of a sequence */
  int64_t loops;         /* the fixed loop count, 0 where sessions choose */
  int64_t max_loops;     /* deepest they may choose; 0 where the model has no loop */
  int64_t default_loops; /* the trained depth */
  int64_t cache_bytes_per_token; /* of a sequence at default_loops */
  uint64_t weight_bytes; /* of the files that weights lie in */
  int32_t native;        /* 1 where native operators run */
  const char* backend;   /* "onnxruntime"; lives as long as the runner */
  int32_t has_text;      /* 1 where mythos_encode, mythos_decode and texts of tokens are to be had; mythos_encode says why not */
  int64_t window;        /* tokens of a sequence, the last ones, that its cache holds at most; 0: all */
} mythos_info;

/* Opens the bundle in a folder: its manifest is checked against the schema, and size and sha256 of every file, before anything is used.
 * options: NULL for the defaults. Takes some 0.1 s and more for large bundles, whose files are read once. */
MYTHOS_API mythos_status mythos_runner_open(const char* bundle, const mythos_options* options, mythos_runner** runner);

/* Frees a runner; its sessions must be closed before. NULL is ignored. */
MYTHOS_API void mythos_runner_close(mythos_runner* runner);

/* Fills info, whose size the caller has set. */
MYTHOS_API mythos_status mythos_runner_info(const mythos_runner* runner, mythos_info* info);

/* Bytes that a step of `tokens` tokens of each of `batch` sequences must read and write: weights (looped ones once a loop; of routed experts
 * those that the tokens choose in the mean, were every choice as likely), past_len cached tokens of each, which may be a mean, and the
 * new ones. n_loops: 0 for the trained depth. Decode of few sequences is bound by it: so many bytes over the bandwidth of memory is the
 * time it takes at least. */
MYTHOS_API mythos_status mythos_step_bytes(const mythos_runner* runner, int64_t batch, int64_t tokens, double past_len, int64_t n_loops,
                                           double* bytes);

/* ---- Sequences that grow together, for those who bring their own sampler ---- */

typedef struct mythos_session mythos_session;

/* New, empty sequences. batch: B, at least 1. n_loops: depth of each [B], or NULL for the trained one. */
MYTHOS_API mythos_status mythos_session_open(mythos_runner* runner, int64_t batch, const int64_t* n_loops, mythos_session** session);

/* Frees a session and its cache. NULL is ignored. */
MYTHOS_API void mythos_session_close(mythos_session* session);

/* Feeds each sequence its next tokens: prefill with many, decode with one. ids[b]: lengths[b] (at least 1) tokens of sequence b, all b
 * of B. logits [B, V] float32, exit_loop [B] (the loop, from 1, at which the token halted): of the last token of each; either may be
 * NULL. Long prompts are fed in chunks. */
MYTHOS_API mythos_status mythos_session_advance(mythos_session* session, const int64_t* const* ids, const size_t* lengths,
                                                float* logits, int64_t* exit_loop);

/* Tokens in the cache, [B]. */
MYTHOS_API mythos_status mythos_session_past_len(const mythos_session* session, int64_t* past_len);

/* Sets the depth from here on, [B]. A sequence may run fewer loops later, never more: its earlier tokens left no cache rows there. */
MYTHOS_API mythos_status mythos_session_lower_n_loops(mythos_session* session, const int64_t* n_loops);

/* Goes on with these sequences only, `count` of them, rising; B is `count` afterwards. */
MYTHOS_API mythos_status mythos_session_keep(mythos_session* session, const int64_t* rows, size_t count);

/* Stops the step that runs, and any begun later: they return MYTHOS_CANCELLED and leave the session as it was. Any thread may call. */
MYTHOS_API void mythos_session_cancel(mythos_session* session);

/* Makes a cancelled session usable again. */
MYTHOS_API mythos_status mythos_session_resume(mythos_session* session);

/* ---- Generating ---- */

/* A generated token; it and its text live during the callback. Newer libraries may add members at its end. */
typedef struct mythos_token {
  int64_t id;
  double logprob;    /* natural log-probability under the model, before temperature and filters */
  int64_t index;     /* its sequence */
  const char* text;  /* UTF-8 that it adds to the output, text_size bytes and a final 0; "" while a character or a possible stop text is
                      * unfinished, and where has_text is 0 */
  size_t text_size;
} mythos_token;

/* Called with every token as it comes. Returns 0 to go on, anything else to stop the generation. Must not call functions of the same
 * session. */
typedef int32_t (*mythos_token_callback)(const mythos_token* token, void* user);

/* How to choose tokens, and when to end. The algorithm, and its random numbers, are those of runtimes/sampling.py: the same seed gives the
 * same tokens there. */
typedef struct mythos_request {
  size_t size;
  int64_t max_new_tokens;    /* of each sequence, at least 1 */
  double temperature;        /* 0: greedy */
  int64_t top_k;             /* candidates kept; 0: all */
  double top_p;              /* probability kept, above 0; 1: all */
  double min_p;              /* share of the likeliest candidate's probability below which others are dropped; 0: none */
  double repetition_penalty; /* divides positive and multiplies negative logits of tokens seen before; 1: none */
  uint64_t seed;             /* sequence i draws from seed + i */
  const int64_t* stop_ids;   /* tokens that end a sequence, n_stop_ids of them */
  size_t n_stop_ids;
  int32_t ignore_eos;        /* 1: go on after a token that the bundle says ends a text */
  const int64_t* n_loops;    /* depth of each sequence, or NULL for the trained one */
  const char* const* stop_texts; /* n_stop_texts texts in UTF-8, or names of special tokens, that end a sequence; left out of its text */
  size_t n_stop_texts;
} mythos_request;

MYTHOS_API void mythos_request_init(mythos_request* request);

/* Why a sequence ended. */
typedef enum mythos_finish {
  MYTHOS_FINISH_NONE = 0,
  MYTHOS_FINISH_LENGTH = 1,   /* max_new_tokens */
  MYTHOS_FINISH_EOS = 2,      /* a token that the bundle says ends a text */
  MYTHOS_FINISH_STOP = 3,     /* one of stop_ids */
  MYTHOS_FINISH_CONTEXT = 4,  /* the model's last position */
  MYTHOS_FINISH_CANCELLED = 5
} mythos_finish;

/* Counts and times. Seconds are wall clock; tokens are those of all sequences. */
typedef struct mythos_stats {
  size_t size;
  int64_t prompt_tokens;
  int64_t new_tokens;
  double prefill_seconds; /* up to the first token of each */
  double decode_seconds;  /* of the steps after */
  int64_t decode_tokens;  /* made in decode_seconds */
  double mean_exit_loop;  /* how much depth the new tokens used */
} mythos_stats;

/* Generates after each of `batch` prompts: prompts[b] holds lengths[b] token ids.
 *
 * request: NULL for greedy, 128 tokens. callback: NULL for none. finish [batch] and stats (whose size the caller has set) may be NULL.
 * Returns MYTHOS_CANCELLED where the callback stopped it; stats and finish are filled then as well. */
MYTHOS_API mythos_status mythos_generate(mythos_runner* runner, const int64_t* const* prompts, const size_t* lengths, int64_t batch,
                                         const mythos_request* request, mythos_token_callback callback, void* user,
                                         mythos_finish* finish, mythos_stats* stats);

/* Natural log-probability of every token after the first: ids holds n (at least 2), logprobs has room for n - 1. n_loops: 0 for the
 * trained depth. */
MYTHOS_API mythos_status mythos_score(mythos_runner* runner, const int64_t* ids, size_t n, int64_t n_loops, double* logprobs);

/* ---- Text: UTF-8, by the bundle's tokenizer.json; the same ids and texts as in Python ----
 *
 * Byte-level BPE without normalizer is read; for other tokenizers, bundles without one, and libraries built without text, these
 * functions return MYTHOS_ERROR_INPUT with the reason. Runners may be used by any number of threads at once, streams by one. */

/* Token ids of a text of `size` bytes, written to ids as far as there is room; n: how many there are. */
MYTHOS_API mythos_status mythos_encode(const mythos_runner* runner, const char* text, size_t size, int64_t* ids, size_t room, size_t* n);

/* Text of n token ids, special tokens left out, bytes that make no character as U+FFFD; written as far as there is room, without a final
 * 0. size: bytes it has. Ids without a token have no text. */
MYTHOS_API mythos_status mythos_decode(const mythos_runner* runner, const int64_t* ids, size_t n, char* text, size_t room, size_t* size);

/* Text that grows token by token, for sessions; its runner must outlive it. */
typedef struct mythos_text_stream mythos_text_stream;

MYTHOS_API mythos_status mythos_text_stream_open(const mythos_runner* runner, mythos_text_stream** stream);

/* Frees a stream. NULL is ignored. */
MYTHOS_API void mythos_text_stream_close(mythos_text_stream* stream);

/* What the token `id` adds: whole characters, size bytes and a final 0, "" while one is unfinished. last: 1 where nothing follows, so
 * that unfinished bytes come out as U+FFFD. text lives until the stream's next call. */
MYTHOS_API mythos_status mythos_text_stream_add(mythos_text_stream* stream, int64_t id, int32_t last, const char** text, size_t* size);

/* ---- Statistics ---- */

/* stats as one JSON object, written to text with a final 0 if it fits into `room` bytes; returns the length it has without the 0. */
MYTHOS_API size_t mythos_stats_json(const mythos_stats* stats, char* text, size_t room);

#ifdef __cplusplus
}
#endif

#endif
