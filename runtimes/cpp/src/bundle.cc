#include "bundle.h"

#include <openssl/evp.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "error.h"

namespace mythos {
namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr int64_t kFormatVersion = 6, kOldest = 4;
constexpr int64_t kBlock = 256;  // rows by which caches grow
constexpr uintmax_t kManifestLimit = uintmax_t{64} << 20;  // bytes; a manifest is a few KB
constexpr char kManifest[] = "manifest.json";
constexpr size_t kPiece = size_t{1} << 20;

std::string text(const fs::path& path) { return path.generic_string(); }

std::string sha256_of(const fs::path& path) {
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  std::ifstream file(path, std::ios::binary);
  if (!file) damaged(text(path) + ": cannot be read; copy the whole bundle again");
  std::vector<char> piece(kPiece);
  bool ok = context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr);
  while (ok && file) {
    file.read(piece.data(), static_cast<std::streamsize>(piece.size()));
    ok = EVP_DigestUpdate(context.get(), piece.data(), static_cast<size_t>(file.gcount()));
  }
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (!ok || !EVP_DigestFinal_ex(context.get(), digest, &size)) failed("OpenSSL computes no sha256 here");
  std::string hex;
  for (unsigned int i = 0; i < size; ++i) {
    constexpr char digits[] = "0123456789abcdef";
    hex += digits[digest[i] >> 4];
    hex += digits[digest[i] & 15];
  }
  return hex;
}

// The members of an object: all of `needed`, and besides them only those of `known`.
void check_members(const json& object, const std::string& where, const std::set<std::string>& needed,
                   const std::set<std::string>& known) {
  if (!object.is_object()) throw std::invalid_argument(where + " is no object");
  for (const auto& name : needed)
    if (!object.contains(name)) throw std::invalid_argument(where + " lacks " + name);
  for (const auto& [name, value] : object.items())
    if (!needed.count(name) && !known.count(name)) throw std::invalid_argument(where + " has an unknown member " + name);
}

int64_t number(const json& object, const std::string& name, int64_t least = 0) {
  const json& value = object.at(name);
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX}) ||
      value.get<int64_t>() < least)
    throw std::invalid_argument(name + " is " + value.dump() + "; expected an integer of at least " + std::to_string(least));
  return value.get<int64_t>();
}

std::string one_of(const json& object, const std::string& name, const std::set<std::string>& known) {
  const std::string value = object.at(name).get<std::string>();
  if (!known.count(value)) throw std::invalid_argument(name + " is \"" + value + "\", which is unknown");
  return value;
}

Graph graph_of(const json& object) {
  static const std::set<std::string> members{"file",          "weights",       "dtype",      "cache_dtype", "weight_dtype",
                                             "loops",         "max_loops",     "default_loops", "prelude_slots", "loop_slots",
                                             "coda_slots",    "cache_width",   "vocab_size", "max_seq_len"};
  check_members(object, "a graph", members, {"window", "cuda_file"});
  Graph graph;
  graph.file = object.at("file").get<std::string>();
  graph.weights = object.at("weights").get<std::vector<std::string>>();
  graph.dtype = one_of(object, "dtype", {"float32", "float16", "bfloat16"});
  graph.cache_dtype = one_of(object, "cache_dtype", {"float32", "float16", "bfloat16", "int8"});
  graph.weight_dtype = object.at("weight_dtype").get<std::string>();
  if (!object.at("loops").is_null()) graph.loops = number(object, "loops");
  const int64_t least_loops = graph.loops == 0 ? 0 : 1;
  graph.max_loops = number(object, "max_loops", least_loops);
  graph.default_loops = number(object, "default_loops", least_loops);
  graph.prelude_slots = number(object, "prelude_slots");
  graph.loop_slots = number(object, "loop_slots");
  graph.coda_slots = number(object, "coda_slots");
  graph.cache_width = number(object, "cache_width", 1);
  graph.vocab_size = number(object, "vocab_size", 1);
  graph.max_seq_len = number(object, "max_seq_len", 1);
  if (object.contains("window")) graph.window = number(object, "window");
  if (graph.most_cache_bytes() > kMostCacheBytes) throw std::invalid_argument("a graph's cache is larger than any memory");
  return graph;
}

Manifest parsed(const fs::path& path) {
  std::error_code error;
  const uintmax_t size = fs::file_size(path, error);
  if (!error && size > kManifestLimit)
    damaged(text(path) + ": " + std::to_string(size) + " bytes, more than a manifest can have; the bundle is damaged");
  std::ifstream file(path, std::ios::binary);
  try {
    const json head = json::parse(file);
    if (!head.is_object() || !head.contains("format") || head["format"] != "mythos-bundle")
      damaged(text(path) + ": \"format\" is not \"mythos-bundle\"; this is not a bundle of mythos-export");
    const json version = head.value("format_version", json());
    if (!version.is_number_integer() || version < kOldest || version > kFormatVersion)
      damaged(text(path) + ": format version " + version.dump() + ", this release reads " + std::to_string(kOldest) + " to " +
              std::to_string(kFormatVersion) +
              "; export the checkpoint again, or install the mythos-export that made the bundle");
    check_members(head, "the manifest", {"format", "format_version", "producer", "model", "graphs", "files", "source"},
                  {"tokenizer", "eos_token_ids", "quantization", "parity"});
    Manifest manifest;
    for (const json& graph : head.at("graphs")) manifest.graphs.push_back(graph_of(graph));
    for (const auto& [name, entry] : head.at("files").items()) {
      check_members(entry, name, {"size", "sha256"}, {});
      manifest.files[name] = {static_cast<uint64_t>(number(entry, "size")), entry.at("sha256").get<std::string>()};
    }
    manifest.model = head.at("model").dump();
    manifest.quantization = head.value("quantization", json()).dump();
    if (head.contains("eos_token_ids")) manifest.eos_token_ids = head.at("eos_token_ids").get<std::vector<int64_t>>();
    if (head.contains("tokenizer") && !head["tokenizer"].is_null()) manifest.tokenizer = head["tokenizer"].get<std::string>();
    return manifest;
  } catch (const json::exception& problem) {
    damaged(text(path) + ": damaged manifest: " + problem.what() + "; export the checkpoint again");
  } catch (const std::invalid_argument& problem) {
    damaged(text(path) + ": damaged manifest: " + problem.what() + "; export the checkpoint again");
  }
}

void check_file(const fs::path& folder, const std::string& name, const FileEntry& entry) {
  const fs::path relative(name);
  bool leaves = relative.is_absolute() || name.find('\\') != std::string::npos || name.empty();
  for (const auto& part : relative) leaves = leaves || part == "..";
  if (leaves)
    damaged(text(folder / kManifest) + ": names \"" + name + "\", which leaves the bundle's folder; do not use this bundle");
  fs::path path = folder;
  for (const auto& part : relative) {
    path /= part;
    if (fs::is_symlink(path))
      damaged(text(path) + ": is a link; a bundle holds plain files only, copy the file in its place");
  }
  if (!fs::is_regular_file(path)) damaged(text(path) + ": missing, though the manifest lists it; copy the whole bundle again");
  const uintmax_t size = fs::file_size(path);
  if (size != entry.size)
    damaged(text(path) + ": " + std::to_string(size) + " bytes, the manifest says " + std::to_string(entry.size) +
            "; copy the whole bundle again");
  const std::string digest = sha256_of(path);
  if (digest != entry.sha256)
    damaged(text(path) + ": sha256 " + digest.substr(0, 16) + "… does not match the manifest's " + entry.sha256.substr(0, 16) +
            "…: the file was changed or damaged; copy the bundle again or export the checkpoint again");
}

}  // namespace

double Graph::most_cache_bytes() const {
  const auto real = [](int64_t value) { return static_cast<double>(value); };
  const double slots_most =
      real(prelude_slots) + real(std::max({max_loops, default_loops, loops.value_or(0)})) * real(loop_slots) + real(coda_slots);
  return slots_most * real(max_seq_len) * (real(cache_width) * sizeof(float) + sizeof(float));
}

uint64_t Manifest::weight_bytes(const Graph& graph) const {
  uint64_t bytes = 0;
  for (const auto& name : graph.weights) bytes += files.at(name).size;
  return bytes;
}

uint64_t Manifest::weight_memory(const Graph& graph) const {
  const bool widened = graph.dtype == "float32" && (graph.weight_dtype == "float16" || graph.weight_dtype == "bfloat16");
  return (widened ? 2 : 1) * weight_bytes(graph);
}

int64_t Graph::rows(int64_t tokens) const {
  const int64_t blocks = (std::max<int64_t>(tokens, 1) + kBlock - 1) / kBlock * kBlock;
  return window ? std::min(blocks, window) : blocks;
}

Manifest open_bundle(const fs::path& folder) {
  if (!fs::is_directory(folder)) damaged(text(folder) + ": no such folder; expected a bundle made by `mythos-export export`");
  const fs::path path = folder / kManifest;
  if (!fs::is_regular_file(path) || fs::is_symlink(path))
    damaged(text(folder) + ": not a bundle, it holds no " + kManifest + "; make one with `mythos-export export`");
  Manifest manifest = parsed(path);
  for (const auto& [name, entry] : manifest.files) {
    try {
      check_file(folder, name, entry);
    } catch (const fs::filesystem_error& problem) {
      damaged(text(folder) + ": cannot read \"" + name.substr(0, 80) + "\", which the manifest lists: " + problem.what());
    }
  }
  std::set<std::string> unlisted;
  if (!manifest.tokenizer.empty() && !manifest.files.count(manifest.tokenizer)) unlisted.insert(manifest.tokenizer);
  for (const Graph& graph : manifest.graphs) {
    if (!manifest.files.count(graph.file)) unlisted.insert(graph.file);
    for (const auto& name : graph.weights)
      if (!manifest.files.count(name)) unlisted.insert(name);
  }
  std::string names;
  for (const auto& name : unlisted) names += (names.empty() ? "" : ", ") + name;
  if (!unlisted.empty() || manifest.graphs.empty())
    damaged(text(path) + ": names " + (names.empty() ? "no graph" : names) + " without a checksum; export again");
  return manifest;
}

}  // namespace mythos
