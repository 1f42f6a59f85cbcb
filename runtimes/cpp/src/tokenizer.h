// Text to token ids and back, from a bundle's tokenizer.json: the same ids and texts as Hugging Face's tokenizers gives Python.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mythos {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // Throws Error for text that is no UTF-8.
  virtual std::vector<int64_t> encode(std::string_view text) const = 0;
  // The bytes that a token stands for, which may be part of a character; none for special tokens and ids without a token.
  virtual std::string bytes(int64_t id) const = 0;
  // The special token of that name.
  virtual std::optional<int64_t> special(const std::string& name) const = 0;
};

// A tokenizer, or why there is none and what to do.
struct Text {
  std::unique_ptr<Tokenizer> tokenizer;
  std::string missing;

  // Throws Error where there is none.
  const Tokenizer& need() const;
};

// name: of the file in the bundle's folder, "" where the bundle has none. Throws Error for a file that is no tokenizer.json.
Text open_text(const std::filesystem::path& folder, const std::string& name);

// The text of one sequence as it grows: whole characters, nothing that may still become part of a stop text. As StreamedText in
// runtimes/generation.py.
class TextStream {
 public:
  // tokenizer: may be null, then all text is empty; must outlive this. stops: texts that end the sequence, left out of it.
  TextStream(const Tokenizer* tokenizer, std::vector<std::string> stops) : tokenizer_(tokenizer), stops_(std::move(stops)) {}
  // What this token lets out. last: nothing follows, so unfinished bytes come out as replacement characters.
  std::string add(int64_t token, bool last);
  // Whether a stop text came.
  bool stopped() const { return stopped_; }

 private:
  size_t held_back() const;

  const Tokenizer* tokenizer_;
  std::vector<std::string> stops_;
  std::string pending_;  // bytes that may be the beginning of a character
  std::string held_;     // characters not let out yet
  bool stopped_ = false;
};

}  // namespace mythos
