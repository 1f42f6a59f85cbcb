// A batch of sequences and their cache: prefill in chunks, decode step by step, each row at its own depth.
//
// Shape letters: B batch, S new tokens, C capacity and W width of the cache, V vocab_size.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "backend.h"

namespace mythos {

// Bytes that all caches of a runner may take together.
class MemoryBudget {
 public:
  explicit MemoryBudget(uint64_t limit) : limit_(limit) {}
  // Throws Error (MYTHOS_ERROR_MEMORY) where that is more than is left.
  void take(uint64_t bytes);
  void give_back(uint64_t bytes) { used_.fetch_sub(bytes); }

 private:
  uint64_t limit_;  // 0: none
  std::atomic<uint64_t> used_{0};
};

// Bytes taken from a budget for as long as this lives.
class MemoryShare {
 public:
  // Throws Error (MYTHOS_ERROR_MEMORY).
  MemoryShare(MemoryBudget& budget, uint64_t bytes) : budget_(budget), bytes_(bytes) { budget.take(bytes); }
  ~MemoryShare() { budget_.give_back(bytes_); }
  MemoryShare(const MemoryShare&) = delete;
  MemoryShare& operator=(const MemoryShare&) = delete;
  // Throws Error (MYTHOS_ERROR_MEMORY).
  void resize(uint64_t bytes) {
    if (bytes > bytes_)
      budget_.take(bytes - bytes_);
    else
      budget_.give_back(bytes_ - bytes);
    bytes_ = bytes;
  }

 private:
  MemoryBudget& budget_;
  uint64_t bytes_;
};

// Memory that grows without being copied, pages of the system's own: what is not written yet takes address space only, and malloc,
// which keeps more free memory the larger the blocks that it gave out, does not learn of its size.
class Buffer {
 public:
  explicit Buffer(size_t bytes) { resize(bytes); }
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  // Throws std::bad_alloc.
  void resize(size_t bytes);
  char* data() { return data_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

using Rows = std::vector<std::vector<int64_t>>;

// Throws Error for a depth the graph cannot run.
void check_n_loops(const Graph& graph, const std::vector<int64_t>& n_loops);

class Session {
 public:
  // n_loops: of each row, or empty for the trained depth. tokens: how long the sequences are expected to become. Throws Error.
  Session(Backend& backend, MemoryBudget& budget, int64_t batch, const std::vector<int64_t>& n_loops, int64_t tokens = 0);
  int64_t batch() const { return static_cast<int64_t>(length_.size()); }
  const std::vector<int64_t>& past_len() const { return length_; }
  StopSignal& stop() { return stop_; }

  // Feeds each row its next tokens. logits [B, V], exit_loop [B]: after the last one of each; may be null.
  void advance(const Rows& ids, float* logits, int64_t* exit_loop);
  // The same for one row; position(logits [V], i) is called for every token i.
  void advance_scored(const std::vector<int64_t>& ids, const std::function<void(const float*, size_t)>& position);
  void lower_n_loops(const std::vector<int64_t>& n_loops);
  void keep(const std::vector<int64_t>& rows);

 private:
  struct Step;
  void check_ids(const Rows& ids) const;
  std::unique_ptr<StepOutput> run(const Step& step);
  void append(const StepOutput& out, const Step& step);
  void reserve(const Rows& ids);
  std::vector<char> overwritten_by(const Rows& ids);
  void lay_out(const std::vector<int64_t>& rows, int64_t capacity);
  uint64_t bytes(int64_t capacity, int64_t batch) const;
  // Each part of the cache: where it lies, and the bytes of a row in it.
  template <typename Part>
  void for_parts(Part part) {
    part(cache_, row_bytes_);
    if (int8_) part(scales_, sizeof(float));
  }

  Backend& backend_;
  MemoryBudget& budget_;
  StopSignal stop_;
  int64_t slots_, capacity_;
  size_t row_bytes_;
  MemoryShare share_;  // before what it is for
  std::vector<int64_t> length_, n_loops_;
  const bool int8_;
  Buffer cache_;   // [slots, B, C, W]; the row of position p at p mod C
  Buffer scales_;  // [slots, B, C] float of an int8 cache
};

}  // namespace mythos
