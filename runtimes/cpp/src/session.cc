#include "session.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <string>

#include "error.h"

namespace mythos {

namespace {

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

namespace {

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

Buffer::~Buffer() {
  if (data_) munmap(data_, bytes_);
}

void Buffer::resize(size_t bytes) {
  bytes = std::max<size_t>(bytes, 1);
  void* moved = data_ ? mremap(data_, bytes_, bytes, MREMAP_MAYMOVE)
                      : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (moved == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(moved);
  bytes_ = bytes;
}

Session::Session(Backend& backend, MemoryBudget& budget, int64_t batch, const std::vector<int64_t>& n_loops, int64_t tokens)
    : backend_(backend),
      budget_(budget),
      slots_(checked_slots(backend.graph(), batch, n_loops)),
      capacity_(backend.graph().rows(std::min(tokens, backend.graph().max_seq_len))),
      row_bytes_(static_cast<size_t>(backend.graph().cache_width) * backend.graph().cache_item_size()),
      share_(budget, bytes(capacity_, batch)),
      length_(static_cast<size_t>(batch), 0),
      n_loops_(n_loops.empty() ? std::vector<int64_t>(static_cast<size_t>(batch), trained_loops(backend.graph())) : n_loops),
      int8_(backend.graph().cache_dtype == "int8"),
      cache_(static_cast<size_t>(slots_ * batch * capacity_) * row_bytes_),
      scales_(int8_ ? static_cast<size_t>(slots_ * batch * capacity_) * sizeof(float) : 0) {}

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
                        length_.data(), cache_.data(),  int8_ ? reinterpret_cast<const float*>(scales_.data()) : nullptr,
                        step.positions.data(), n_loops_.data()};
  return backend_.run(input, stop_);
}

void Session::advance(const Rows& ids, float* logits, int64_t* exit_loop) {
  check_ids(ids);
  const int64_t vocab = backend_.graph().vocab_size;
  const auto chunk = static_cast<size_t>(backend_.longest_step());
  size_t longest = 0;
  for (const auto& row : ids) longest = std::max(longest, row.size());
  reserve(ids);
  const std::vector<int64_t> before = length_;
  const std::vector<char> lost = longest > chunk ? overwritten_by(ids) : std::vector<char>();
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
    length_ = before;  // rows of chunks that ran are overwritten later, or have overwritten these
    const char* from = lost.data();
    if (!lost.empty())
      for_parts([&](Buffer& part, size_t row) {
        const size_t size = static_cast<size_t>(slots_ * batch() * capacity_) * row;
        std::memcpy(part.data(), from, size);
        from += size;
      });
    throw;
  }
}

void Session::advance_scored(const std::vector<int64_t>& ids, const std::function<void(const float*, size_t)>& position) {
  const Rows rows{ids};
  check_ids(rows);
  reserve(rows);
  const int64_t vocab = backend_.graph().vocab_size;
  const auto chunk = static_cast<size_t>(backend_.longest_step());
  for (size_t start = 0; start < ids.size(); start += chunk) {
    const Step step(rows, start, chunk, true);
    const auto out = run(step);
    append(*out, step);
    for (int64_t i = 0; i < step.seq; ++i) position(out->logits() + i * vocab, start + static_cast<size_t>(i));
  }
}

// Of each sequence's new rows those that there is room for, the last ones, from its next place in the ring on.
void Session::append(const StepOutput& out, const Step& step) {
  const int64_t rows = batch();
  const char* fresh = static_cast<const char*>(out.new_kv());
  for_parts([&](Buffer& part, size_t row) {
    for (int64_t slot = 0; slot < slots_; ++slot) {
      for (int64_t b = 0; b < rows; ++b) {
        const int64_t length = length_[static_cast<size_t>(b)], count = step.counts[static_cast<size_t>(b)];
        const int64_t skipped = std::max<int64_t>(0, count - capacity_), at = (length + skipped) % capacity_;
        const int64_t left = count - skipped, first = std::min(left, capacity_ - at);
        char* sequence = part.data() + static_cast<size_t>((slot * rows + b) * capacity_) * row;
        const char* from = fresh + static_cast<size_t>((slot * rows + b) * step.seq + skipped) * row;
        std::memcpy(sequence + static_cast<size_t>(at) * row, from, static_cast<size_t>(first) * row);
        std::memcpy(sequence, from + static_cast<size_t>(first) * row, static_cast<size_t>(left - first) * row);
      }
    }
    fresh = reinterpret_cast<const char*>(out.new_scale());
  });
  for (size_t b = 0; b < length_.size(); ++b) length_[b] += step.counts[b];
}

// Room for the sequences with these tokens.
void Session::reserve(const Rows& ids) {
  const Graph& graph = backend_.graph();
  int64_t longest = 0;
  for (size_t b = 0; b < ids.size(); ++b) longest = std::max(longest, length_[b] + static_cast<int64_t>(ids[b].size()));
  if (longest <= capacity_ || capacity_ == graph.window) return;
  // An eighth more than before, in whole blocks: a long sequence is moved a few times, not once a block.
  const int64_t capacity = graph.rows(std::max(longest, capacity_ * 9 / 8));
  share_.resize(bytes(capacity, batch()));
  std::vector<int64_t> all(length_.size());
  std::iota(all.begin(), all.end(), int64_t{0});
  try {
    lay_out(all, capacity);
  } catch (const std::bad_alloc&) {
    share_.resize(bytes(capacity_, batch()));
    throw;
  }
}

// A copy of the cache where these tokens would take the place of others; else empty.
std::vector<char> Session::overwritten_by(const Rows& ids) {
  bool any = false;
  for (size_t b = 0; b < ids.size(); ++b) any = any || (length_[b] && length_[b] + static_cast<int64_t>(ids[b].size()) > capacity_);
  std::vector<char> copy;
  if (!any) return copy;
  for_parts([&](Buffer& part, size_t row) {
    copy.insert(copy.end(), part.data(), part.data() + static_cast<size_t>(slots_ * batch() * capacity_) * row);
  });
  return copy;
}

// Moves the rows of these sequences, rising, to where they stand in a cache of that capacity, which lies where the old one does.
void Session::lay_out(const std::vector<int64_t>& rows, int64_t capacity) {
  const int64_t before = batch(), after = static_cast<int64_t>(rows.size()), n = slots_ * after;
  const bool grows = after * capacity > before * capacity_;
  const auto resize = [&](Buffer& part, size_t row) { part.resize(static_cast<size_t>(n * capacity) * row); };
  if (grows) for_parts(resize);
  for_parts([&](Buffer& part, size_t row) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = grows ? n - 1 - i : i, slot = to / after, old = rows[static_cast<size_t>(to % after)];
      const size_t count = static_cast<size_t>(std::min(length_[static_cast<size_t>(old)], capacity_));
      std::memmove(part.data() + static_cast<size_t>(to * capacity) * row,
                   part.data() + static_cast<size_t>((slot * before + old) * capacity_) * row, count * row);
    }
  });
  if (!grows) for_parts(resize);
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
  lay_out(rows, capacity_);
  std::vector<int64_t> length, n_loops;
  for (const int64_t row : rows) {
    length.push_back(length_[static_cast<size_t>(row)]);
    n_loops.push_back(n_loops_[static_cast<size_t>(row)]);
  }
  length_.swap(length);
  n_loops_.swap(n_loops);
  share_.resize(bytes(capacity_, batch()));
}

}  // namespace mythos
