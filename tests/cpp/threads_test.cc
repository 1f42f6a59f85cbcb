// Threads: sessions of one model side by side, and cancellation.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "bundle.h"

namespace {

class Threads : public OnBundle {};

constexpr int kThreads = 4;

TEST_F(Threads, SessionsOfOneModelRunSideBySide) {
  mythos::Runner runner(bundle(), one_thread());
  mythos::Request request;
  request.max_new_tokens = 12;
  request.temperature = 0.9;
  request.seed = 3;
  const auto want = runner.generate({{5, 6, 7}, {8}}, request);
  const auto score = runner.score({5, 6, 7, 8});
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(number("MYTHOS_TEST_SECONDS", 1));
  std::atomic<int> turns{0};
  const auto work = [&] {
    while (std::chrono::steady_clock::now() < until) {
      const auto generated = runner.generate({{5, 6, 7}, {8}}, request);
      EXPECT_EQ(generated.ids, want.ids);
      EXPECT_EQ(generated.texts, want.texts);
      EXPECT_EQ(runner.score({5, 6, 7, 8}), score);
      mythos::Session session = runner.session(2);
      session.advance({{1, 2}, {3}});
      session.keep({1});
      EXPECT_THROW(session.advance({{-1}}), mythos::Error);
      EXPECT_EQ(session.past_len(), mythos::Ids{1});
      if (runner.info().has_text) {
        EXPECT_EQ(runner.decode(runner.encode("a thread's text")), "a thread's text");
      }
      ++turns;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work);
  for (auto& thread : threads) thread.join();
  EXPECT_GE(turns, kThreads);
}

TEST_F(Threads, RunnersOpenSideBySide) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([] { EXPECT_EQ(mythos::Runner(bundle(), one_thread()).generate({{1}}).ids.size(), 1u); });
  for (auto& thread : threads) thread.join();
}

TEST_F(Threads, EachHasItsOwnLastError) {
  mythos_runner* runner = nullptr;
  ASSERT_NE(mythos_runner_open("/nowhere", nullptr, &runner), MYTHOS_OK);
  std::thread([] { EXPECT_STREQ(mythos_last_error(), ""); }).join();
  EXPECT_STRNE(mythos_last_error(), "");
}

TEST_F(Threads, AnotherThreadCancelsAndTheSessionGoesOn) {
  mythos::Runner runner(bundle(), one_thread());
  for (int turn = 0; turn < 5; ++turn) {
    mythos::Session session = runner.session();
    session.advance({{1, 2, 3}});
    std::thread stopper([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(turn));
      session.cancel();
    });
    const auto until_stopped = [&] {
      try {
        while (true) session.advance({{4}});
      } catch (const mythos::Error& error) {
        return error.status();
      }
    };
    EXPECT_EQ(until_stopped(), MYTHOS_CANCELLED);
    stopper.join();
    const auto before = session.past_len();
    session.resume();
    session.advance({{4}});
    EXPECT_EQ(session.past_len().at(0), before.at(0) + 1);
  }
}

}  // namespace
