// What the tests share: a bundle, and numbers from the environment.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "mythos/runtime.hpp"

inline std::string bundle() {
  const char* named = std::getenv("MYTHOS_TEST_CPP_BUNDLE");
  return named ? named : "";
}

inline int number(const char* variable, int otherwise) {
  const char* given = std::getenv(variable);
  return given ? std::atoi(given) : otherwise;
}

inline mythos::Options one_thread() {
  mythos::Options options;
  options.threads = 1;
  return options;
}

// A folder of its own for a test.
class Folder {
 public:
  Folder() : path_(std::filesystem::temp_directory_path() / ("mythos-" + std::to_string(::getpid()) + "-" + name())) {
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  static std::string name() { return ::testing::UnitTest::GetInstance()->current_test_info()->name(); }
  std::filesystem::path path_;
};

class OnBundle : public ::testing::Test {
 protected:
  void SetUp() override {
    if (bundle().empty()) GTEST_SKIP() << "MYTHOS_TEST_CPP_BUNDLE names no bundle";
  }
};
