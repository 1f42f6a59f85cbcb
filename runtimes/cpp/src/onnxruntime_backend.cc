// The bundle's graph on onnxruntime's CPU provider: weights mapped from disk, nothing copied in.
#include <onnxruntime_cxx_api.h>

#include <cstdlib>

#include "backend.h"
#include "error.h"
#include "onnxruntime_library.h"

namespace mythos {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kFewWeights = uint64_t{1} << 30;  // beside which a step's tensors of 512 tokens are more than a few percent

ONNXTensorElementDataType element_type(const std::string& dtype) {
  if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (dtype == "int8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

// One environment for all runners, for as long as the process lives: onnxruntime's threads and allocators end with it.
Ort::Env& environment() {
  static Ort::Env* env = new Ort::Env(ORT_LOGGING_LEVEL_FATAL, "mythos");
  return *env;
}

// The native operators: as given, as MYTHOS_OPERATORS names them, or beside this library.
fs::path operators_of(const std::string& given) {
  if (!given.empty()) return given;
  if (const char* named = std::getenv("MYTHOS_OPERATORS"); named && *named) return named;
  const fs::path own = own_folder(), beside = own / "libmythos_ops.so";
  return fs::exists(beside) ? beside : own / "../../../native/lib/libmythos_ops.so";  // where the Python package has both
}

class Outputs : public StepOutput {
 public:
  Outputs(std::vector<Ort::Value> values, bool has_scale) : values_(std::move(values)), has_scale_(has_scale) {}
  const float* logits() const override { return values_[0].GetTensorData<float>(); }
  const void* new_kv() const override { return values_[1].GetTensorRawData(); }
  const int64_t* exit_loop() const override { return values_[2].GetTensorData<int64_t>(); }
  const float* new_scale() const override { return has_scale_ ? values_[3].GetTensorData<float>() : nullptr; }

 private:
  std::vector<Ort::Value> values_;
  bool has_scale_;
};

class OnnxRuntimeBackend : public Backend {
 public:
  OnnxRuntimeBackend(const fs::path& folder, Graph graph, const BackendOptions& options)
      : graph_(std::move(graph)), int8_(graph_.cache_dtype == "int8"), longest_step_(options.longest_step), session_(nullptr) {
    const fs::path operators = operators_of(options.operators);
    const bool there = fs::is_regular_file(operators);
    if (options.native == 1 && !there)
      failed("native operators are asked for, but there is no " + operators.string() + "; name the library in operators_library");
    native_ = there && options.native != 0;
    try {
      session_ = open(folder / graph_.file, options.threads, native_ ? operators : fs::path());
    } catch (const Ort::Exception& error) {
      if (!native_ || options.native == 1)
        failed((folder / graph_.file).string() + ": onnxruntime refuses it: " + error.what());
      native_ = false;
      try {
        session_ = open(folder / graph_.file, options.threads, {});
      } catch (const Ort::Exception& again) {
        failed((folder / graph_.file).string() + ": onnxruntime refuses it: " + again.what());
      }
    }
    inputs_ = {"input_ids", "past_len", "past_kv", "logit_positions"};
    if (!graph_.loops) inputs_.push_back("n_loops");
    if (int8_) inputs_.push_back("past_scale");
    outputs_ = {"logits", "new_kv", "exit_loop"};
    if (int8_) outputs_.push_back("new_scale");
    check_contract(folder);
  }

  const char* name() const override { return "onnxruntime"; }
  const Graph& graph() const override { return graph_; }
  bool native() const override { return native_; }
  int64_t longest_step() const override { return longest_step_; }

  std::unique_ptr<StepOutput> run(const StepInput& step, StopSignal& stop) override {
    const int64_t b = step.batch, width = graph_.cache_width;
    std::vector<Ort::Value> values;
    values.push_back(integers(step.input_ids, {b, step.seq}));
    values.push_back(integers(step.past_len, {b}));
    const int64_t cache[] = {step.slots, b, step.capacity, width};
    const size_t bytes = static_cast<size_t>(step.slots * b * step.capacity * width) * graph_.cache_item_size();
    values.push_back(Ort::Value::CreateTensor(memory_, const_cast<void*>(step.past_kv), bytes, cache, 4,
                                              element_type(graph_.cache_dtype)));
    values.push_back(integers(step.logit_positions, {b, step.k}));
    if (!graph_.loops) values.push_back(integers(step.n_loops, {b}));
    if (int8_)
      values.push_back(Ort::Value::CreateTensor<float>(memory_, const_cast<float*>(step.past_scale),
                                                       static_cast<size_t>(step.slots * b * step.capacity), cache, 3));
    Ort::RunOptions options;
    options.SetRunLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);  // a cancelled step is no error to print
    try {
      const StopSignal::Step stoppable(stop, [&options] { options.SetTerminate(); });
      return std::make_unique<Outputs>(
          session_.Run(options, inputs_.data(), values.data(), values.size(), outputs_.data(), outputs_.size()), int8_);
    } catch (const Ort::Exception& error) {
      if (stop.is_set()) throw Error(MYTHOS_CANCELLED, "the step was cancelled");
      failed(std::string("onnxruntime could not run a step: ") + error.what());
    }
  }

 private:
  static Ort::Session open(const fs::path& file, int threads, const fs::path& operators) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);  // what goes wrong is reported
    options.DisableMemPattern();   // it takes one block for all that a step computes and keeps all of it until the step ends
    options.DisableCpuMemArena();  // it grows in powers of two and keeps the largest prefill's memory; no speed was seen to come of it
    // Prepacked weights would be a second copy of every matrix; they stay mapped from the file instead.
    options.AddConfigEntry("session.disable_prepacking", "1");
    if (!operators.empty()) options.RegisterCustomOpsLibrary(operators.c_str());
    return Ort::Session(environment(), file.c_str(), options);
  }

  Ort::Value integers(const int64_t* data, std::vector<int64_t> shape) const {
    size_t count = 1;
    for (const int64_t size : shape) count *= static_cast<size_t>(size);
    return Ort::Value::CreateTensor<int64_t>(memory_, const_cast<int64_t*>(data), count, shape.data(), shape.size());
  }

  // Refuses a manifest that contradicts its graph: what the runner believes of shapes comes from the manifest.
  void check_contract(const fs::path& folder) {
    Ort::AllocatorWithDefaultOptions allocator;
    const auto contradiction = [&](const std::string& what) {
      damaged((folder / graph_.file).string() + ": its " + what + " is not what the manifest says; export again");
    };
    if (session_.GetInputCount() != inputs_.size()) contradiction("number of inputs");
    if (session_.GetOutputCount() != outputs_.size()) contradiction("number of outputs");
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const std::string name = session_.GetInputNameAllocated(i, allocator).get();
      bool known = false;
      for (const char* input : inputs_) known = known || name == input;
      if (!known) contradiction("input " + name);
      if (name != "past_kv") continue;
      const auto info = session_.GetInputTypeInfo(i);
      const auto shape = info.GetTensorTypeAndShapeInfo().GetShape();
      if (info.GetTensorTypeAndShapeInfo().GetElementType() != element_type(graph_.cache_dtype)) contradiction("cache's dtype");
      if (shape.size() != 4 || shape[3] != graph_.cache_width) contradiction("cache_width");
      if (graph_.loops && shape[0] != graph_.slots(*graph_.loops)) contradiction("number of slots");
    }
    for (size_t i = 0; i < outputs_.size(); ++i) {
      if (std::string(session_.GetOutputNameAllocated(i, allocator).get()) != "logits") continue;
      const auto info = session_.GetOutputTypeInfo(i);
      const auto shape = info.GetTensorTypeAndShapeInfo().GetShape();
      if (shape.empty() || shape.back() != graph_.vocab_size) contradiction("vocab_size");
    }
  }

  Graph graph_;
  bool int8_, native_ = false;
  int64_t longest_step_;
  Ort::Session session_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<const char*> inputs_, outputs_;
};

// onnxruntime's CPU kernels compute in float32, whatever the weights are stored in.
const Graph& chosen(const Manifest& manifest) {
  std::string graphs;
  for (const Graph& graph : manifest.graphs) {
    if (graph.dtype == "float32" && graph.cache_dtype != "bfloat16") return graph;
    graphs += (graphs.empty() ? "" : ", ") + graph.dtype + " with a " + graph.cache_dtype + " cache";
  }
  failed("the bundle has graphs for " + graphs + " only; onnxruntime's CPU provider needs one that computes in float32, with a cache "
         "of float32, float16 or int8: export again with this release");
}

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const fs::path& folder, const Manifest& manifest, const BackendOptions& options) {
  const Graph& graph = chosen(manifest);
  const uint64_t weights = manifest.weight_memory(graph);
  if (options.memory_limit && weights > options.memory_limit)
    throw Error(MYTHOS_ERROR_MEMORY, "the weights take " + std::to_string(weights) + " bytes, more than the memory_limit of " +
                                         std::to_string(options.memory_limit) + "; raise it, or quantize the bundle");
  load_onnxruntime();
  BackendOptions filled = options;
  if (filled.longest_step == 0) filled.longest_step = weights < kFewWeights ? 256 : 512;
  return std::make_unique<OnnxRuntimeBackend>(folder, graph, filled);
}

}  // namespace mythos
