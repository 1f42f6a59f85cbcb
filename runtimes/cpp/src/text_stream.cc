#include <algorithm>

#include "error.h"
#include "tokenizer.h"
#include "utf8.h"

namespace mythos {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

}  // namespace

const Tokenizer& Text::need() const {
  if (!tokenizer) refuse(missing);
  return *tokenizer;
}

std::string TextStream::add(int64_t token, bool last) {
  if (!tokenizer_ || stopped_) return "";
  pending_ += tokenizer_->bytes(token);
  const std::string readable = readable_utf8(pending_);
  if (last || !ends_with(readable, kReplacement)) {
    held_ += readable;
    pending_.clear();
  }
  size_t end = std::string::npos;
  for (const auto& stop : stops_) end = std::min(end, held_.find(stop));
  stopped_ = end != std::string::npos;
  if (!stopped_) end = held_.size() - (last ? 0 : held_back());
  std::string text = held_.substr(0, end);
  held_.erase(0, end);
  return text;
}

// Length of the longest tail that a stop text begins with.
size_t TextStream::held_back() const {
  size_t longest = 0;
  for (const auto& stop : stops_)
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; --n)
      if (ends_with(held_, std::string_view(stop).substr(0, n))) longest = n;
  return longest;
}

}  // namespace mythos
