#include "backend.h"

namespace mythos {

void StopSignal::set() {
  const std::lock_guard<std::mutex> lock(mutex_);
  set_.store(true);
  if (stop_) stop_();
}

StopSignal::Step::Step(StopSignal& signal, std::function<void()> stop) : signal_(signal) {
  const std::lock_guard<std::mutex> lock(signal_.mutex_);
  signal_.stop_ = std::move(stop);
  if (signal_.set_.load()) signal_.stop_();
}

StopSignal::Step::~Step() {
  const std::lock_guard<std::mutex> lock(signal_.mutex_);
  signal_.stop_ = nullptr;
}

}  // namespace mythos
