#include "session.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "error.h"

namespace mythos {

namespace {

constexpr int64_t kBlock = 256;  // rows by which caches grow

std::string number(int64_t value) { return std::to_string(value); }

}  // namespace

void MemoryBudget::take(uint64_t bytes) {
  const uint64_t used = used_.fetch_add(bytes) + bytes;
  if (limit_ && used > limit_) {
    used_.fetch_sub(bytes);
    throw Error(MYTHOS_ERROR_MEMORY, "a cache of " + std::to_string(bytes) + " bytes would exceed the memory_limit of " +
                                         std::to_string(limit_) + " by " + std::to_string(used - limit_) +
                                         "; close sessions, shorten them, or raise it");
  }
}

namespace {

// Throws Error for a depth the graph cannot run.
void check_n_loops(const Graph& graph, const std::vector<int64_t>& n_loops) {
  for (const int64_t value : n_loops) {
    if (graph.loops == 0 && value) refuse("n_loops is " + number(value) + ", but the model has no loop; leave it out");
    if (graph.loops && value != *graph.loops)
      refuse("n_loops is " + number(value) + ", but the bundle was exported for exactly " + number(*graph.loops) +
             "; export it with --loops dynamic or --loops " + number(value));
    if (!graph.loops && (value < 1 || value > graph.max_loops))
      refuse("n_loops is " + number(value) + "; expected 1 to " + number(graph.max_loops) +
             ", the bundle's max_loops (export with --max-loops for more)");
  }
}

int64_t trained_loops(const Graph& graph) { return graph.loops.value_or(graph.default_loops); }

// Cache slots of sequences of these depths, or of the trained one.
int64_t checked_slots(const Graph& graph, int64_t batch, const std::vector<int64_t>& n_loops) {
  if (batch < 1) refuse("batch is " + number(batch) + "; expected at least 1");
  if (static_cast<double>(batch) * graph.most_cache_bytes() > kMostCacheBytes)
    throw Error(MYTHOS_ERROR_MEMORY, "batch is " + number(batch) + ", more than any memory holds; lower it");
  check_n_loops(graph, n_loops);
  return graph.slots(n_loops.empty() ? trained_loops(graph) : *std::max_element(n_loops.begin(), n_loops.end()));
}

}  // namespace

// Input of one step: the ids of each row padded to the longest, and where each row's last one stands.
struct Session::Step {
  int64_t seq = 0, k = 1;
  std::vector<int64_t> counts, ids, positions;

  Step(const Rows& rows, size_t start, size_t chunk, bool every_position) {
    for (const auto& row : rows) {
      const size_t count = row.size() > start ? std::min(chunk, row.size() - start) : 0;
      counts.push_back(static_cast<int64_t>(count));
      seq = std::max(seq, counts.back());
    }
    ids.assign(rows.size() * static_cast<size_t>(seq), 0);
    for (size_t b = 0; b < rows.size(); ++b)
      for (int64_t i = 0; i < counts[b]; ++i) ids[b * static_cast<size_t>(seq) + static_cast<size_t>(i)] = rows[b][start + static_cast<size_t>(i)];
    if (every_position) k = seq;
    for (size_t b = 0; b < rows.size(); ++b)
      for (int64_t i = 0; i < k; ++i) positions.push_back(every_position ? i : std::max<int64_t>(counts[b] - 1, 0));
  }
};

Session::Session(Backend& backend, MemoryBudget& budget, int64_t batch, const std::vector<int64_t>& n_loops)
    : backend_(backend),
      budget_(budget),
      slots_(checked_slots(backend.graph(), batch, n_loops)),
      capacity_(kBlock),
      row_bytes_(static_cast<size_t>(backend.graph().cache_width) * backend.graph().cache_item_size()),
      share_(budget, bytes(capacity_, batch)),
      length_(static_cast<size_t>(batch), 0),
      n_loops_(n_loops.empty() ? std::vector<int64_t>(static_cast<size_t>(batch), trained_loops(backend.graph())) : n_loops),
      cache_(static_cast<size_t>(slots_ * batch * capacity_) * row_bytes_, 0),
      scales_(backend.graph().cache_dtype == "int8" ? static_cast<size_t>(slots_ * batch * capacity_) : 0, 0) {}

uint64_t Session::bytes(int64_t capacity, int64_t batch) const {
  return static_cast<uint64_t>(slots_ * batch * capacity) * backend_.graph().cache_row_size();
}

void Session::check_ids(const Rows& ids) const {
  const Graph& graph = backend_.graph();
  if (ids.size() != length_.size())
    refuse(number(static_cast<int64_t>(ids.size())) + " rows of ids for a session of " + number(batch()) + " sequences");
  for (size_t b = 0; b < ids.size(); ++b) {
    const std::string what = "sequence " + std::to_string(b);
    if (ids[b].empty()) refuse(what + " is empty; give at least one token");
    for (const int64_t id : ids[b])
      if (id < 0 || id >= graph.vocab_size)
        refuse(what + " holds token id " + number(id) + "; expected ids from 0 to " + number(graph.vocab_size - 1) +
               " (is this the model's tokenizer?)");
    const int64_t total = length_[b] + static_cast<int64_t>(ids[b].size());
    if (total > graph.max_seq_len)
      refuse(what + " has " + number(total) + " tokens, more than the model's max_seq_len of " + number(graph.max_seq_len) +
             "; shorten it");
  }
}

std::unique_ptr<StepOutput> Session::run(const Step& step) {
  if (stop_.is_set()) throw Error(MYTHOS_CANCELLED, "the session was cancelled; mythos_session_resume makes it usable again");
  const StepInput input{batch(),        step.seq,       capacity_,
                        slots_,         step.k,         step.ids.data(),
                        length_.data(), cache_.data(),  scales_.empty() ? nullptr : scales_.data(),
                        step.positions.data(), n_loops_.data()};
  return backend_.run(input, stop_);
}

void Session::advance(const Rows& ids, float* logits, int64_t* exit_loop) {
  check_ids(ids);
  const int64_t vocab = backend_.graph().vocab_size;
  const auto chunk = static_cast<size_t>(backend_.longest_step());
  size_t longest = 0;
  for (const auto& row : ids) longest = std::max(longest, row.size());
  const std::vector<int64_t> before = length_;
  try {
    for (size_t start = 0; start < longest; start += chunk) {
      const Step step(ids, start, chunk, false);
      const auto out = run(step);
      append(*out, step);
      for (size_t b = 0; b < ids.size(); ++b) {
        if (ids[b].size() <= start || ids[b].size() > start + chunk) continue;  // it ends in another chunk
        if (logits) std::copy_n(out->logits() + static_cast<int64_t>(b) * vocab, vocab, logits + static_cast<int64_t>(b) * vocab);
        if (exit_loop) exit_loop[b] = out->exit_loop()[static_cast<int64_t>(b) * step.seq + step.positions[b]];
      }
    }
  } catch (...) {
    length_ = before;  // rows of chunks that ran are overwritten later
    throw;
  }
}

void Session::advance_scored(const std::vector<int64_t>& ids, const std::function<void(const float*, size_t)>& position) {
  const Rows rows{ids};
  check_ids(rows);
  const int64_t vocab = backend_.graph().vocab_size;
  const auto chunk = static_cast<size_t>(backend_.longest_step());
  for (size_t start = 0; start < ids.size(); start += chunk) {
    const Step step(rows, start, chunk, true);
    const auto out = run(step);
    append(*out, step);
    for (int64_t i = 0; i < step.seq; ++i) position(out->logits() + i * vocab, start + static_cast<size_t>(i));
  }
}

void Session::append(const StepOutput& out, const Step& step) {
  int64_t needed = 0;
  for (size_t b = 0; b < length_.size(); ++b) needed = std::max(needed, length_[b] + step.counts[b]);
  reserve(needed);
  const int64_t rows = batch();
  const char* new_rows = static_cast<const char*>(out.new_kv());
  for (int64_t slot = 0; slot < slots_; ++slot) {
    for (int64_t b = 0; b < rows; ++b) {
      const size_t to = static_cast<size_t>((slot * rows + b) * capacity_ + length_[static_cast<size_t>(b)]);
      const size_t from = static_cast<size_t>((slot * rows + b) * step.seq), count = static_cast<size_t>(step.counts[static_cast<size_t>(b)]);
      std::memcpy(cache_.data() + to * row_bytes_, new_rows + from * row_bytes_, count * row_bytes_);
      if (!scales_.empty()) std::copy_n(out.new_scale() + from, count, scales_.data() + to);
    }
  }
  for (size_t b = 0; b < length_.size(); ++b) length_[b] += step.counts[b];
}

void Session::reserve(int64_t rows) {
  if (rows <= capacity_) return;
  // Half as much again, in whole blocks: a long sequence is copied a few times, not once a block.
  const int64_t capacity = (std::max(rows, capacity_ * 3 / 2) + kBlock - 1) / kBlock * kBlock;
  std::vector<int64_t> all(length_.size());
  std::iota(all.begin(), all.end(), int64_t{0});
  resize(capacity, all);
}

// A cache of that capacity with these rows of the batch.
void Session::resize(int64_t capacity, const std::vector<int64_t>& rows) {
  const int64_t before = batch(), after = static_cast<int64_t>(rows.size());
  MemoryShare share(budget_, bytes(capacity, after));
  std::vector<char> cache(static_cast<size_t>(slots_ * after * capacity) * row_bytes_, 0);
  std::vector<float> scales(scales_.empty() ? 0 : static_cast<size_t>(slots_ * after * capacity), 0);
  for (int64_t slot = 0; slot < slots_; ++slot) {
    for (int64_t b = 0; b < after; ++b) {
      const int64_t old = rows[static_cast<size_t>(b)];
      const size_t from = static_cast<size_t>((slot * before + old) * capacity_), to = static_cast<size_t>((slot * after + b) * capacity);
      const size_t count = static_cast<size_t>(length_[static_cast<size_t>(old)]);
      std::memcpy(cache.data() + to * row_bytes_, cache_.data() + from * row_bytes_, count * row_bytes_);
      if (!scales_.empty()) std::copy_n(scales_.data() + from, count, scales.data() + to);
    }
  }
  share_.swap(share);
  cache_.swap(cache);
  scales_.swap(scales);
  capacity_ = capacity;
}

void Session::lower_n_loops(const std::vector<int64_t>& n_loops) {
  check_n_loops(backend_.graph(), n_loops);
  for (size_t b = 0; b < n_loops.size(); ++b)
    if (n_loops[b] > n_loops_[b])
      refuse("n_loops of sequence " + std::to_string(b) + " would rise from " + number(n_loops_[b]) + " to " + number(n_loops[b]) +
             ": its earlier tokens left no cache rows at the deeper loops; start a new sequence at the depth it needs");
  n_loops_ = n_loops;
}

void Session::keep(const std::vector<int64_t>& rows) {
  if (rows.empty()) refuse("no sequence is kept; close the session instead");
  for (size_t i = 0; i < rows.size(); ++i)
    if (rows[i] < 0 || rows[i] >= batch() || (i && rows[i] <= rows[i - 1]))
      refuse("rows to keep are not rising numbers from 0 to " + number(batch() - 1));
  resize(capacity_, rows);
  std::vector<int64_t> length, n_loops;
  for (const int64_t row : rows) {
    length.push_back(length_[static_cast<size_t>(row)]);
    n_loops.push_back(n_loops_[static_cast<size_t>(row)]);
  }
  length_.swap(length);
  n_loops_.swap(n_loops);
}

}  // namespace mythos
