// Nothing is left behind by what was opened and closed, nor by errors. LeakSanitizer sees what the sizes here do not.
#include <unistd.h>

#include "bundle.h"

namespace {

namespace fs = std::filesystem;

class Lifetime : public OnBundle {};

long resident_bytes() {
  std::ifstream file("/proc/self/statm");
  long total = 0, resident = 0;
  file >> total >> resident;
  return resident * sysconf(_SC_PAGE_SIZE);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr long kKept = 1l << 40;  // sanitizers keep what was freed, and find leaks themselves
#else
constexpr long kKept = 16l << 20;
#endif

// Memory after many turns is that after a tenth of them, but for what an allocator keeps.
template <typename Turn>
void stays_small(int turns, Turn turn) {
  long before = 0;
  for (int i = 0; i < turns; ++i) {
    if (i == turns / 10) before = resident_bytes();
    turn(i);
  }
  EXPECT_LT(resident_bytes() - before, kKept);
}

TEST_F(Lifetime, RunnersComeAndGo) {
  stays_small(number("MYTHOS_TEST_OPENS", 20), [](int) {
    mythos::Runner runner(bundle(), one_thread());
    mythos::Request request;
    request.max_new_tokens = 2;
    EXPECT_EQ(runner.generate({{1}}, request).ids.at(0).size(), 2u);
  });
}

TEST_F(Lifetime, SessionsComeAndGo) {
  mythos::Runner runner(bundle(), one_thread());
  stays_small(1000, [&](int turn) {
    mythos::Session session = runner.session(1 + turn % 3);
    if (turn % 10 == 0) session.advance(std::vector<mythos::Ids>(static_cast<size_t>(session.batch()), {1, 2}));
  });
}

TEST_F(Lifetime, ErrorsLeaveNothing) {
  mythos::Options options = one_thread();
  mythos::Runner runner(bundle(), options);
  mythos::Session session = runner.session();
  options.memory_limit = 1;
  stays_small(number("MYTHOS_TEST_OPENS", 20), [&](int) { EXPECT_THROW(mythos::Runner(bundle(), options), mythos::Error); });
  stays_small(1000, [&](int) {
    EXPECT_THROW(mythos::Runner("/nowhere"), mythos::Error);
    EXPECT_THROW(session.advance({{-1}}), mythos::Error);
    EXPECT_THROW(runner.session(0), mythos::Error);
    EXPECT_THROW(runner.generate({{}}), mythos::Error);
    EXPECT_THROW(runner.encode("\xFF"), mythos::Error);
  });
}

TEST_F(Lifetime, DamagedBundlesLeaveNothing) {
  const Folder folder;
  for (const auto& entry : fs::directory_iterator(bundle())) fs::copy(entry, folder.path(), fs::copy_options::recursive);
  const auto spoil = [&](const char* name, const std::string& content) {
    std::ofstream(folder.path() / name, std::ios::binary) << content;
    stays_small(100, [&](int) { EXPECT_THROW(mythos::Runner(folder.path().string()), mythos::Error); });
  };
  spoil("tokenizer.json", "{");
  spoil("decoder.onnx", "");
  spoil("manifest.json", "{\"format\": \"mythos-bundle\", \"format_version\": ");
  spoil("manifest.json", "[]");
}

}  // namespace
