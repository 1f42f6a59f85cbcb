// The operators on the processor, for onnxruntime's CPU provider.
#include "onnxruntime_registry.h"

namespace mythos::onnxruntime {
namespace {

Parallel HostThreads(OrtKernelContext* context) {
  return {context, [](void* host, void (*task)(void*, size_t), size_t n, void* data) {
            // As many batches as tasks: threads take them as they come, so a slow one holds nobody up.
            Ort::KernelContext(static_cast<OrtKernelContext*>(host)).ParallelFor(task, n, n, data);
          }};
}

struct Processor {
  static constexpr const char* kProvider = nullptr;
  static constexpr bool kReadsLengths = true, kQuantizedAttention = true;
  static std::vector<Type> Floats() { return {kFloat}; }
  static std::vector<Type> Caches() { return {kFloat, kHalf, kBFloat16, kInt8}; }

  explicit Processor(const OrtKernelInfo*) {}
  void Run(const NormalizedLinearArgs& a, OrtKernelContext* context) const { NormalizedLinear(a, CurrentKernels(), HostThreads(context)); }
  void Run(const ResidualLinearArgs& a, OrtKernelContext* context) const { ResidualLinear(a, CurrentKernels(), HostThreads(context)); }
  void Run(const FeedForwardArgs& a, OrtKernelContext* context) const { FeedForward(a, CurrentKernels(), HostThreads(context)); }
  void Run(const MixtureOfExpertsArgs& a, OrtKernelContext* context) const { MixtureOfExperts(a, CurrentKernels(), HostThreads(context)); }
  void Run(const LatentAttentionArgs& a, OrtKernelContext* context) const { LatentAttention(a, CurrentKernels(), HostThreads(context)); }
  void Run(const GroupedQueryAttentionArgs& a, OrtKernelContext* context) const { GroupedQueryAttention(a, CurrentKernels(), HostThreads(context)); }
  void Run(const RecurrentInputArgs& a, OrtKernelContext* context) const { RecurrentInput(a, CurrentKernels(), HostThreads(context)); }
  void Run(const RecurrentUpdateArgs& a, OrtKernelContext* context) const { RecurrentUpdate(a, CurrentKernels(), HostThreads(context)); }
};

}  // namespace
}  // namespace mythos::onnxruntime

extern "C" {

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return mythos::onnxruntime::Register<mythos::onnxruntime::Registry<mythos::onnxruntime::Processor>>(options, base);
}

// The instruction set in use: the name of its table (see dispatch.cc).
__attribute__((visibility("default"))) const char* mythos_instruction_set() { return mythos::CurrentKernels().name; }

// Uses another one in the whole process, for tests; 0 where this processor lacks it.
__attribute__((visibility("default"))) int mythos_use_instruction_set(const char* name) { return mythos::UseKernels(name); }

}  // extern "C"
