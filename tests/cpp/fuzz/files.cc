// A bundle whose manifest, or whose tokenizer.json, is the input: opening it must end in an error and a message. Its graph is none, so that
// no bundle opens. Where MYTHOS_TEST_SEEDS names a folder, it is given inputs to begin with, of the bundle that MYTHOS_TEST_CPP_BUNDLE
// names.
#include <openssl/evp.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "mythos/runtime.h"

namespace {

namespace fs = std::filesystem;

void write(const fs::path& path, const std::string& content) { std::ofstream(path, std::ios::binary) << content; }

std::string sha256(const std::string& content) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  size_t size = 0;
  EVP_Q_digest(nullptr, "SHA256", nullptr, content.data(), content.size(), digest, &size);
  std::string hex;
  for (size_t i = 0; i < size; ++i) {
    char two[3];
    std::snprintf(two, sizeof(two), "%02x", digest[i]);
    hex += two;
  }
  return hex;
}

std::string entry(const std::string& name, const std::string& content) {
  return "\"" + name + "\": {\"size\": " + std::to_string(content.size()) + ", \"sha256\": \"" + sha256(content) + "\"}";
}

constexpr char kGraph[] = "not a graph", kWeights[] = "weights";

// A manifest that is right about every file.
std::string manifest(const std::string& tokenizer) {
  return R"({"format": "mythos-bundle", "format_version": 5, "producer": {}, "model": {}, "source": {}, "graphs": [{"file":
"decoder.onnx", "weights": ["weights.bin"], "dtype": "float32", "cache_dtype": "float32", "weight_dtype": "float32", "loops": null,
"max_loops": 12, "default_loops": 4, "prelude_slots": 1, "loop_slots": 1, "coda_slots": 1, "cache_width": 24, "vocab_size": 2048,
"max_seq_len": 512, "window": 0}], "tokenizer": "tokenizer.json", "eos_token_ids": [0], "files": {)" +
         entry("decoder.onnx", kGraph) + ", " + entry("weights.bin", kWeights) + ", " + entry("tokenizer.json", tokenizer) + "}}";
}

std::string content_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

const fs::path& folder() {
  static const fs::path made = [] {
    const fs::path path = fs::temp_directory_path() / ("mythos-fuzz-" + std::to_string(::getpid()));
    fs::create_directories(path);
    write(path / "decoder.onnx", kGraph);
    write(path / "weights.bin", kWeights);
    return path;
  }();
  return made;
}

}  // namespace

// Inputs to begin with.
extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const char* bundle = std::getenv("MYTHOS_TEST_CPP_BUNDLE");
  const char* seeds = std::getenv("MYTHOS_TEST_SEEDS");
  if (!bundle || !seeds) return 0;
  const std::string small = R"({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{"id": 0, "content": "<e>",
"special": true}], "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}, "post_processor": null, "decoder":
{"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": {"<e>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}})";
  write(fs::path(seeds) / "manifest", "m" + manifest("{}"));
  write(fs::path(seeds) / "real_manifest", "m" + content_of(fs::path(bundle) / "manifest.json"));
  write(fs::path(seeds) / "tokenizer", "t" + small);
  write(fs::path(seeds) / "real_tokenizer", "t" + content_of(fs::path(bundle) / "tokenizer.json"));
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (!size) return 0;
  const std::string input(reinterpret_cast<const char*>(data) + 1, size - 1);
  const bool is_manifest = data[0] == 'm';
  const std::string tokenizer = is_manifest ? "{}" : input;
  write(folder() / "tokenizer.json", tokenizer);
  write(folder() / "manifest.json", is_manifest ? input : manifest(tokenizer));
  mythos_options options;
  mythos_options_init(&options);
  options.threads = 1;
  options.native = 0;
  mythos_runner* runner = nullptr;
  const mythos_status status = mythos_runner_open(folder().c_str(), &options, &runner);
  if (status == MYTHOS_OK || status == MYTHOS_ERROR_INTERNAL || !*mythos_last_error()) {
    std::fprintf(stderr, "status %d: %s\n", status, mythos_last_error());
    std::abort();
  }
  return 0;
}
