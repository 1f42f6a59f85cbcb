// Byte-level BPE by the package pytorch-tokenizers. Where its reading of a tokenizer.json would differ from Hugging Face's, there is no
// text: wrong ids would go unnoticed.
#include "tokenizer.h"

#include "error.h"
#include "utf8.h"

#ifdef MYTHOS_TEXT
#include <pytorch/tokenizers/hf_tokenizer.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#endif

namespace mythos {
namespace fs = std::filesystem;

#ifdef MYTHOS_TEXT
namespace {

using nlohmann::json;

const json& member(const json& file, const char* pointer) {
  static const json none;
  const json::json_pointer where(pointer);
  return file.contains(where) ? file.at(where) : none;
}

// What every part of the file may be.
std::string unread_part(const json& file) {
  static const struct {
    const char* pointer;
    std::vector<json> read;
  } rules[] = {
      {"/model/type", {"BPE"}},
      {"/model/dropout", {nullptr}},
      {"/model/unk_token", {nullptr}},
      {"/model/continuing_subword_prefix", {nullptr, ""}},
      {"/model/end_of_word_suffix", {nullptr, ""}},
      {"/model/byte_fallback", {nullptr, false}},
      {"/normalizer", {nullptr}},
      {"/pre_tokenizer/type", {"ByteLevel"}},
      {"/pre_tokenizer/use_regex", {nullptr, true}},
      {"/post_processor/type", {nullptr, "ByteLevel"}},
      {"/decoder/type", {"ByteLevel"}},
      {"/truncation", {nullptr}},
      {"/padding", {nullptr}},
  };
  for (const auto& rule : rules) {
    const json& value = member(file, rule.pointer);
    if (std::find(rule.read.begin(), rule.read.end(), value) == rule.read.end())
      return std::string(rule.pointer) + " is " + value.dump().substr(0, 80) + ", expected " + rule.read.back().dump();
  }
  return "";
}

size_t characters(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// Vocabulary and merges: the library takes a word that is a token as it is, which merging must come to as well, and id 0 for none.
std::string unread_vocabulary(const json& file, const std::set<int64_t>& added) {
  const bool any_token = member(file, "/model/ignore_merges") == json(true);
  std::set<std::string> merged;
  for (const json& merge : file.at("model").at("merges")) {
    if (!merge.is_array()) return "its merges are texts, expected pairs; save it again with a newer release of tokenizers";
    merged.insert(merge.at(0).get<std::string>() + merge.at(1).get<std::string>());
  }
  size_t bytes = 0;
  for (const auto& [token, id] : file.at("model").at("vocab").items()) {
    if (added.count(id.get<int64_t>())) continue;
    const bool single = characters(token) == 1;
    if (single && id == 0) return "id 0 is the byte-level token " + token + ", expected a special or merged one";
    if (!single && !any_token && !merged.count(token)) return "no merge makes its token " + token;
    bytes += single ? 1 : 0;
  }
  return bytes == 256 ? "" : "its vocabulary has " + std::to_string(bytes) + " single bytes, expected 256";
}

std::string unread_added_tokens(const json& file) {
  std::vector<std::string> names;
  for (const json& token : file.at("added_tokens")) {
    const std::string name = token.at("content").get<std::string>();
    for (const char* flag : {"single_word", "lstrip", "rstrip"})
      if (token.value(flag, false)) return "its added token " + name + " is " + flag;
    const bool plain = std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c < 0x7F; });
    if (!token.value("special", false) && !plain) return "its added token " + name + " is not special and has more than ASCII characters";
    names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  for (size_t i = 1; i < names.size(); ++i)
    if (names[i].compare(0, names[i - 1].size(), names[i - 1]) == 0)
      return "its added token " + names[i] + " begins with another, " + names[i - 1];
  return "";
}

class BytePairTokenizer : public Tokenizer {
 public:
  BytePairTokenizer(const std::string& path, const json& file) {
    if (tokenizer_.load(path) != tokenizers::Error::Ok) damaged(path + ": the tokenizers library refuses it; export again");
    for (const json& token : file.at("added_tokens"))
      if (token.value("special", false)) special_[token.at("content").get<std::string>()] = token.at("id").get<int64_t>();
    for (const auto& [name, id] : special_) special_ids_.insert(id);
  }

  std::vector<int64_t> encode(std::string_view text) const override {
    const size_t invalid = first_invalid_utf8(text);
    if (invalid < text.size())
      refuse("text is no UTF-8: no character begins with byte " + std::to_string(invalid) + "; convert it to UTF-8 first");
    const auto ids = tokenizer_.encode(std::string(text), 0, 0);
    if (!ids.ok()) failed("the tokenizers library could not encode the text; pass token ids");
    return {ids->begin(), ids->end()};
  }

  std::string bytes(int64_t id) const override {
    if (id < 0 || special_ids_.count(id)) return "";
    const auto piece = tokenizer_.decode(0, static_cast<uint64_t>(id));
    return piece.ok() ? *piece : "";
  }

  std::optional<int64_t> special(const std::string& name) const override {
    const auto found = special_.find(name);
    return found == special_.end() ? std::nullopt : std::optional(found->second);
  }

 private:
  tokenizers::HFTokenizer tokenizer_;
  std::map<std::string, int64_t> special_;
  std::set<int64_t> special_ids_;
};

Text opened(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const json file = json::parse(stream);
  std::string unread = unread_part(file);
  if (unread.empty()) unread = unread_added_tokens(file);
  if (unread.empty()) {
    std::set<int64_t> added;
    for (const json& token : file.at("added_tokens")) added.insert(token.at("id").get<int64_t>());
    unread = unread_vocabulary(file, added);
  }
  if (!unread.empty()) return {nullptr, path + ": cannot be read as in Python: " + unread + "; encode in Python and pass token ids"};
  return {std::make_unique<BytePairTokenizer>(path, file), ""};
}

}  // namespace
#endif

Text open_text(const fs::path& folder, const std::string& name) {
  if (name.empty()) return {nullptr, "the bundle has no tokenizer; pass token ids, or export it with --tokenizer tokenizer.json"};
#ifdef MYTHOS_TEXT
  const std::string path = (folder / name).generic_string();
  try {
    return opened(path);
  } catch (const json::exception& problem) {
    damaged(path + ": not a tokenizer.json of Hugging Face tokenizers: " + problem.what() + "; export again");
  }
#else
  (void)folder;
  return {nullptr, "this libmythos_runtime was built without text; pass token ids, or build it with -DMYTHOS_TEXT=ON"};
#endif
}

}  // namespace mythos
