// The C interface of experts: checks, and the choice between the two ways of running them.
#include <algorithm>
#include <climits>

#include "experts.cuh"

namespace mythos::cuda {

constexpr int kFewTokens = 4;

// Tensor cores want rows of whole 16-byte pieces.
bool is_few(const mythos_cuda_experts& e) {
  return e.dtype == MYTHOS_CUDA_FLOAT32 || e.tokens <= kFewTokens || e.dim % 8 != 0 || e.expert_dim % 8 != 0;
}

namespace {

bool is_valid(const mythos_cuda_experts* e) {
  if (e == nullptr || e->size < sizeof(mythos_cuda_experts)) return false;
  const bool sizes = e->tokens >= 0 && e->dim > 0 && e->expert_dim > 0 && e->top_k > 0 && e->routed >= e->top_k && e->shared >= 0;
  const bool dtype = e->dtype >= MYTHOS_CUDA_FLOAT32 && e->dtype <= MYTHOS_CUDA_BFLOAT16;
  // Rows are counted with int inside the kernels.
  return sizes && dtype && int64_t(e->tokens) * (int64_t(e->top_k) + e->shared) <= INT_MAX / 2;
}

}  // namespace
}  // namespace mythos::cuda

using namespace mythos::cuda;

extern "C" {

__attribute__((visibility("default"))) uint32_t mythos_cuda_version(void) { return MYTHOS_CUDA_VERSION; }

__attribute__((visibility("default"))) const char* mythos_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

__attribute__((visibility("default"))) uint64_t mythos_cuda_experts_workspace(const mythos_cuda_experts* e) {
  if (!is_valid(e)) return 0;
  if (is_few(*e) && e->tokens > kFewTokens) return few_workspace(*e);
  mythos_cuda_experts few = *e;
  few.tokens = std::min(e->tokens, kFewTokens);
  return std::max(few_workspace(few), is_few(*e) ? 0 : many_workspace(*e));
}

__attribute__((visibility("default"))) int32_t mythos_cuda_experts_launch(const mythos_cuda_experts* e, void* stream) {
  if (!is_valid(e) || e->workspace_bytes < mythos_cuda_experts_workspace(e)) return cudaErrorInvalidValue;
  if (e->tokens == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (e->dtype) {
    case MYTHOS_CUDA_FLOAT16:
      return is_few(*e) ? launch_few<__half>(*e, on) : launch_many<__half>(*e, on);
    case MYTHOS_CUDA_BFLOAT16:
      return is_few(*e) ? launch_few<__nv_bfloat16>(*e, on) : launch_many<__nv_bfloat16>(*e, on);
    default:
      return launch_few<float>(*e, on);
  }
}

}  // extern "C"
