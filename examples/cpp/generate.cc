// Generates after a prompt of token ids, and prints ids as they come: generate BUNDLE 1,2,3 [MAX_NEW_TOKENS [TEMPERATURE SEED]]
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "mythos/runtime.hpp"

int main(int argc, char** argv) try {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s BUNDLE 1,2,3 [MAX_NEW_TOKENS [TEMPERATURE SEED]]\n", argv[0]);
    return 2;
  }
  mythos::Ids prompt;
  std::stringstream text(argv[2]);
  for (std::string id; std::getline(text, id, ',');) prompt.push_back(std::stoll(id));
  mythos::Request request;
  if (argc > 3) request.max_new_tokens = std::atoll(argv[3]);
  if (argc > 5) {
    request.temperature = std::atof(argv[4]);
    request.seed = std::strtoull(argv[5], nullptr, 10);
  }
  mythos::Runner runner(argv[1]);
  const auto generated = runner.generate({prompt}, request, [](const mythos::Token& token) {
    std::printf("%lld ", static_cast<long long>(token.id));
    std::fflush(stdout);
    return true;
  });
  std::printf("\n");
  std::fprintf(stderr, "%s\n", generated.stats_json().c_str());
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
