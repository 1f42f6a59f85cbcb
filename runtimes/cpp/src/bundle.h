// A bundle's manifest and its checks, as in runtimes/bundle.py: what is wrong is said in the same words.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace mythos {

struct FileEntry {
  uint64_t size;
  std::string sha256;
};

constexpr double kMostCacheBytes = 0x1p56;

struct Graph {
  std::string file;
  std::vector<std::string> weights;
  std::string dtype, cache_dtype, weight_dtype;
  std::optional<int64_t> loops;  // none: an input; 0: the model has no loop
  int64_t max_loops, default_loops, prelude_slots, loop_slots, coda_slots, cache_width, vocab_size, max_seq_len;
  int64_t window = 0;  // positions that the layer that sees most sees, and rows kept of a sequence at most; 0: all

  int64_t slots(int64_t n_loops) const { return prelude_slots + n_loops * loop_slots + coda_slots; }
  size_t cache_item_size() const { return cache_dtype == "float16" ? 2 : cache_dtype == "int8" ? 1 : 4; }
  // Bytes of the longest sequence at the greatest depth; no count of bytes overflows where that is below kMostCacheBytes.
  double most_cache_bytes() const;
  // Rows of a cache for sequences of so many tokens: that of position p stands at p mod them.
  int64_t rows(int64_t tokens) const;
  // Bytes of a token in a slot: its row and, in an int8 cache, the row's scale.
  size_t cache_row_size() const {
    return static_cast<size_t>(cache_width) * cache_item_size() + (cache_dtype == "int8" ? sizeof(float) : 0);
  }
};

struct Manifest {
  std::vector<Graph> graphs;
  std::map<std::string, FileEntry> files;
  std::vector<int64_t> eos_token_ids;
  std::string model, quantization;  // their descriptions, JSON; "null" where nothing is quantized
  std::string tokenizer;  // file, "" where there is none

  // Of the files that a graph's weights lie in.
  uint64_t weight_bytes(const Graph& graph) const;
  // Memory that they take as the graph computes with them: 16-bit ones are widened.
  uint64_t weight_memory(const Graph& graph) const;
};

// Checks everything a bundle names before anything of it is used. Throws Error.
Manifest open_bundle(const std::filesystem::path& folder);

}  // namespace mythos
