// Calls in any order with any numbers, on the bundle that MYTHOS_TEST_CPP_BUNDLE names: each must end in a status, errors with a message,
// and the runner must generate the same afterwards.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "mythos/runtime.h"

namespace {

using Ids = std::vector<int64_t>;

mythos_runner* runner() {
  static mythos_runner* opened = [] {
    mythos_options options;
    mythos_options_init(&options);
    options.threads = 1;
    options.memory_limit = uint64_t{64} << 20;
    mythos_runner* made = nullptr;
    const char* bundle = std::getenv("MYTHOS_TEST_CPP_BUNDLE");
    if (mythos_runner_open(bundle, &options, &made) != MYTHOS_OK) {
      std::fprintf(stderr, "MYTHOS_TEST_CPP_BUNDLE: %s\n", mythos_last_error());
      std::exit(1);
    }
    return made;
  }();
  return opened;
}

void check(mythos_status status) {
  if (status == MYTHOS_ERROR_INTERNAL || (status != MYTHOS_OK && !*mythos_last_error())) {
    std::fprintf(stderr, "status %d: %s\n", status, mythos_last_error());
    std::abort();
  }
}

struct Rows {
  std::vector<Ids> ids;
  std::vector<const int64_t*> pointers;
  std::vector<size_t> lengths;

  Rows(FuzzedDataProvider& data, int64_t batch) {
    for (int64_t b = 0; b < batch; ++b) {
      Ids row;
      for (size_t n = data.ConsumeIntegralInRange<size_t>(0, 6); n; --n)
        row.push_back(data.ConsumeBool() ? data.ConsumeIntegral<int64_t>() : data.ConsumeIntegralInRange<int64_t>(0, 2047));
      ids.push_back(std::move(row));
    }
    for (const Ids& row : ids) {
      pointers.push_back(row.empty() ? nullptr : row.data());
      lengths.push_back(row.size());
    }
  }
};

Ids numbers(FuzzedDataProvider& data, size_t n, int64_t most) {
  Ids result(n);
  for (int64_t& value : result)
    value = data.ConsumeBool() ? data.ConsumeIntegral<int64_t>() : data.ConsumeIntegralInRange<int64_t>(-1, most);
  return result;
}

struct SessionOwner {
  mythos_session* session = nullptr;
  int64_t batch = 0;
  ~SessionOwner() { mythos_session_close(session); }
};

void open(FuzzedDataProvider& data, SessionOwner& owner) {
  const bool depths = data.ConsumeBool();
  const int64_t batch = depths || data.ConsumeBool() ? data.ConsumeIntegralInRange<int64_t>(-1, 3) : data.ConsumeIntegral<int64_t>();
  const Ids n_loops = numbers(data, static_cast<size_t>(std::max<int64_t>(batch, 0)) * depths, 13);
  mythos_session* session = nullptr;
  const mythos_status status = mythos_session_open(runner(), batch, depths ? n_loops.data() : nullptr, &session);
  check(status);
  if (status != MYTHOS_OK) return;
  mythos_session_close(owner.session);
  owner.session = session;
  owner.batch = batch;
}

void step(FuzzedDataProvider& data, SessionOwner& owner) {
  switch (data.ConsumeIntegralInRange<int>(0, 5)) {
    case 0: {
      const Rows rows(data, owner.batch);
      std::vector<int64_t> exit_loop(static_cast<size_t>(owner.batch));
      check(mythos_session_advance(owner.session, rows.pointers.data(), rows.lengths.data(), nullptr, exit_loop.data()));
      break;
    }
    case 1: {
      const Ids kept = numbers(data, data.ConsumeIntegralInRange<size_t>(0, 4), owner.batch);
      const mythos_status status = mythos_session_keep(owner.session, kept.data(), kept.size());
      check(status);
      if (status == MYTHOS_OK) owner.batch = static_cast<int64_t>(kept.size());
      break;
    }
    case 2:
      check(mythos_session_lower_n_loops(owner.session, numbers(data, static_cast<size_t>(owner.batch), 13).data()));
      break;
    case 3:
      mythos_session_cancel(owner.session);
      break;
    case 4:
      check(mythos_session_resume(owner.session));
      break;
    default:
      check(mythos_session_past_len(owner.session, std::make_unique<int64_t[]>(static_cast<size_t>(owner.batch)).get()));
  }
}

void generate(FuzzedDataProvider& data) {
  mythos_request request;
  mythos_request_init(&request);
  request.max_new_tokens = data.ConsumeIntegralInRange<int64_t>(-1, 4);
  request.temperature = data.ConsumeFloatingPoint<double>();
  request.top_k = data.ConsumeIntegral<int64_t>();
  request.top_p = data.ConsumeFloatingPoint<double>();
  request.min_p = data.ConsumeFloatingPoint<double>();
  request.repetition_penalty = data.ConsumeFloatingPoint<double>();
  request.seed = data.ConsumeIntegral<uint64_t>();
  request.ignore_eos = data.ConsumeIntegral<int32_t>();
  if (data.ConsumeBool()) request.temperature = 0.5, request.top_p = 0.9, request.min_p = 0, request.repetition_penalty = 1.5;
  const Ids stops = numbers(data, data.ConsumeIntegralInRange<size_t>(0, 3), 2047);
  request.stop_ids = stops.data();
  request.n_stop_ids = stops.size();
  const std::string stop = data.ConsumeRandomLengthString(4);
  const char* stop_texts[] = {stop.c_str()};
  request.stop_texts = stop_texts;
  request.n_stop_texts = data.ConsumeBool();
  if (data.ConsumeBool()) request.size = data.ConsumeIntegralInRange<size_t>(0, sizeof(request));
  const int64_t batch = data.ConsumeIntegralInRange<int64_t>(-1, 3);
  const Rows rows(data, batch);
  check(mythos_generate(runner(), rows.pointers.data(), rows.lengths.data(), batch, &request, nullptr, nullptr, nullptr, nullptr));
}

void text(FuzzedDataProvider& data) {
  const std::string text = data.ConsumeRandomLengthString(40);
  Ids ids(data.ConsumeIntegralInRange<size_t>(0, 50));
  size_t n = 0;
  check(mythos_encode(runner(), text.data(), text.size(), ids.data(), ids.size(), &n));
  const Ids any = numbers(data, data.ConsumeIntegralInRange<size_t>(0, 8), 2050);
  std::string decoded(data.ConsumeIntegralInRange<size_t>(0, 20), ' ');
  check(mythos_decode(runner(), any.data(), any.size(), decoded.data(), decoded.size(), &n));
  mythos_text_stream* stream = nullptr;
  const mythos_status status = mythos_text_stream_open(runner(), &stream);
  check(status);
  const char* added = nullptr;
  if (status == MYTHOS_OK)
    for (const int64_t id : any) check(mythos_text_stream_add(stream, id, data.ConsumeBool(), &added, &n));
  mythos_text_stream_close(stream);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  FuzzedDataProvider data(bytes, size);
  SessionOwner owner;
  while (data.remaining_bytes()) {
    const int call = data.ConsumeIntegralInRange<int>(0, 5);
    if (call == 0 || !owner.session)
      open(data, owner);
    else if (call == 1)
      generate(data);
    else if (call == 2)
      text(data);
    else
      step(data, owner);
  }
  return 0;
}
