// Goes on with what is typed, line by line, and remembers all of it: chat BUNDLE [MAX_NEW_TOKENS [TEMPERATURE SEED]]
// An answer ends at a blank line, an end-of-text token or after MAX_NEW_TOKENS; Control-C ends it early, Control-D the program.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

#include "mythos/runtime.hpp"

namespace {

volatile std::sig_atomic_t interrupted = 0;

void interrupt(int) { interrupted = 1; }

// The end of the conversation that leaves room for an answer.
mythos::Ids recent(const mythos::Ids& ids, int64_t most) {
  const auto size = static_cast<int64_t>(ids.size());
  return {ids.begin() + (size > most ? size - most : 0), ids.end()};
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s BUNDLE [MAX_NEW_TOKENS [TEMPERATURE SEED]]\n", argv[0]);
    return 2;
  }
  mythos::Runner runner(argv[1]);
  const auto info = runner.info();
  mythos::Request request;
  request.max_new_tokens = argc > 2 ? std::atoll(argv[2]) : 128;
  if (argc > 4) {
    request.temperature = std::atof(argv[3]);
    request.seed = std::strtoull(argv[4], nullptr, 10);
  }
  request.stop_texts = {"\n\n"};
  if (request.max_new_tokens >= info.max_seq_len) {
    std::fprintf(stderr, "error: MAX_NEW_TOKENS is %s; expected less than the model's %lld positions\n", argv[2],
                 static_cast<long long>(info.max_seq_len));
    return 2;
  }
  std::signal(SIGINT, interrupt);
  mythos::Ids conversation;
  for (std::string line; std::getline(std::cin, line);) {
    for (const int64_t id : runner.encode(line + "\n")) conversation.push_back(id);
    interrupted = 0;
    const auto answer = runner.generate({recent(conversation, info.max_seq_len - request.max_new_tokens)}, request,
                                        [](const mythos::Token& token) {
                                          std::fwrite(token.text, 1, token.text_size, stdout);
                                          std::fflush(stdout);
                                          return !interrupted;
                                        });
    std::printf("\n\n");
    for (const int64_t id : answer.ids[0]) conversation.push_back(id);
    ++request.seed;  // another draw for another answer
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
