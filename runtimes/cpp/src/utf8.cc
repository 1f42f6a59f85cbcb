#include "utf8.h"

#include <algorithm>

namespace mythos {
namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";

struct Span {
  size_t size;
  bool whole;  // a character, not a part of one
};

// The character that text begins with, or the longest part of one (at least a byte). text is not empty.
Span leading(std::string_view text) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {1, true};
  const size_t size = lead >= 0xC2 && lead <= 0xDF ? 2 : (lead & 0xF0) == 0xE0 ? 3 : lead >= 0xF0 && lead <= 0xF4 ? 4 : 0;
  if (!size) return {1, false};
  // The second byte's range keeps out overlong forms, surrogates and what lies past U+10FFFF.
  const unsigned char least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80, most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  size_t n = 1;
  while (n < std::min(size, text.size()) && at(n) >= (n == 1 ? least : 0x80) && at(n) <= (n == 1 ? most : 0xBF)) ++n;
  return {n, n == size};
}

}  // namespace

size_t first_invalid_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const Span next = leading(text.substr(at));
    if (!next.whole) break;
    at += next.size;
  }
  return at;
}

std::string readable_utf8(std::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    const Span next = leading(bytes);
    text += next.whole ? bytes.substr(0, next.size) : std::string_view(kReplacement);
    bytes.remove_prefix(next.size);
  }
  return text;
}

}  // namespace mythos
