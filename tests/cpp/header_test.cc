// mythos/runtime.hpp: ownership, exceptions, containers.
#include <unistd.h>

#include "bundle.h"

extern "C" size_t first_request_size(void);

namespace {

class Header : public OnBundle {};

TEST_F(Header, InfoSaysWhatTheBundleHolds) {
  const auto info = mythos::Runner(bundle(), one_thread()).info();
  EXPECT_GT(info.vocab_size, 0);
  EXPECT_GT(info.weight_bytes, 0u);
  EXPECT_STREQ(info.backend, "onnxruntime");
}

TEST_F(Header, SessionAndGenerateChooseTheSame) {
  mythos::Runner runner(bundle(), one_thread());
  mythos::Request request;
  request.max_new_tokens = 8;
  request.ignore_eos = true;
  const mythos::Ids prompt = {5, 6, 7};
  const auto generated = runner.generate({prompt}, request);
  mythos::Session session = runner.session();
  mythos::Ids ids, next = prompt;
  while (ids.size() < 8) {
    const auto logits = session.advance({next}).logits;
    ids.push_back(std::max_element(logits.begin(), logits.end()) - logits.begin());
    next = {ids.back()};
  }
  EXPECT_EQ(generated.ids.at(0), ids);
  EXPECT_EQ(generated.finish.at(0), MYTHOS_FINISH_LENGTH);
  EXPECT_EQ(session.past_len(), mythos::Ids{10});
  EXPECT_NE(generated.stats_json().find("\"new_tokens\": 8"), std::string::npos);
}

TEST_F(Header, CallbackStopsOrThrows) {
  mythos::Runner runner(bundle(), one_thread());
  int heard = 0;
  const auto stopped = runner.generate({{1}, {2, 3}}, {}, [&](const mythos::Token&) { return ++heard < 4; });
  EXPECT_TRUE(stopped.cancelled);
  EXPECT_EQ(stopped.stats.new_tokens, 4);
  const auto thrower = [](const mythos::Token&) -> bool { throw std::runtime_error("mine"); };
  try {
    runner.generate({{1}}, {}, thrower);
    FAIL() << "nothing was thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "mine");
  }
  EXPECT_EQ(runner.generate({{1}}).ids.size(), 1u);  // usable afterwards
}

TEST_F(Header, ErrorsCarryStatusAndMessage) {
  mythos::Runner runner(bundle(), one_thread());
  mythos::Session session = runner.session();
  session.advance({{1, 2}});
  try {
    session.advance({{runner.info().vocab_size}});
    FAIL() << "nothing was thrown";
  } catch (const mythos::Error& error) {
    EXPECT_EQ(error.status(), MYTHOS_ERROR_INPUT);
    EXPECT_NE(std::string(error.what()).find("token id"), std::string::npos) << error.what();
  }
  EXPECT_THROW(session.advance({{1}, {2}}), std::invalid_argument);
  EXPECT_THROW(runner.session(2, {1}), std::invalid_argument);
  EXPECT_EQ(session.past_len(), mythos::Ids{2});
}

TEST_F(Header, SessionsMove) {
  mythos::Runner runner(bundle(), one_thread());
  mythos::Session first = runner.session(2);
  first.advance({{1}, {2, 3}});
  mythos::Session second = std::move(first);
  second.keep({1});
  EXPECT_EQ(second.batch(), 1);
  EXPECT_EQ(second.past_len(), mythos::Ids{2});
}

TEST_F(Header, TextGoesThereAndBack) {
  mythos::Runner runner(bundle(), one_thread());
  if (!runner.info().has_text) GTEST_SKIP() << "built without text";
  const std::string text = "To be, or n\xC3\xB6t\n";
  const auto ids = runner.encode(text);
  EXPECT_EQ(runner.decode(ids), text);
  mythos::TextStream stream = runner.text_stream();
  std::string streamed;
  for (const auto id : ids) streamed += stream.add(id);
  EXPECT_EQ(streamed, text);
  mythos::Request request;
  request.max_new_tokens = 20;
  request.stop_texts = {"e"};
  const auto generated = runner.generate({ids}, request);
  EXPECT_EQ(generated.texts.at(0).find('e'), std::string::npos);
}

TEST_F(Header, StructsOfOtherHeadersAreTaken) {
  mythos_options options;
  mythos_options_init(&options);
  options.threads = 1;
  mythos_runner* plain = nullptr;
  ASSERT_EQ(mythos_runner_open(bundle().c_str(), &options, &plain), MYTHOS_OK);
  mythos_request request;
  mythos_request_init(&request);
  request.max_new_tokens = 2;
  const int64_t prompt[] = {1};
  const int64_t* prompts[] = {prompt};
  const size_t lengths[] = {1};
  const auto generate = [&] { return mythos_generate(plain, prompts, lengths, 1, &request, nullptr, nullptr, nullptr, nullptr); };
  request.size = first_request_size();  // what comes after is not read
  request.n_stop_texts = 1000;
  EXPECT_EQ(generate(), MYTHOS_OK) << mythos_last_error();
  request.size = 1;
  EXPECT_EQ(generate(), MYTHOS_ERROR_INPUT);
  mythos_runner_close(plain);
}

}  // namespace
