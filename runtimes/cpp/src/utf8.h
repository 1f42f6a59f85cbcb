// UTF-8: whether a text is, and bytes as a reader sees them.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace mythos {

// Where the first byte stands that is part of no character; text.size() where all are.
size_t first_invalid_utf8(std::string_view text);

// Each longest beginning of a character that never ends, and each byte that can begin none, becomes U+FFFD, as the Unicode standard
// recommends (3.9, "substitution of maximal subparts").
std::string readable_utf8(std::string_view bytes);

}  // namespace mythos
