// The C interface of experts: checks, and the choice between the two ways of running them.
#include <algorithm>
#include <climits>

#include "experts.cuh"

namespace mythos::cuda {

constexpr int kFewTokens = 4;

// Tensor cores want rows of whole 16-byte pieces, the second product's of pairs at least.
bool is_few(const mythos_cuda_experts& e) {
  const bool pieces = is_quantized(e.dtype) ? row_bytes(e.dtype, e.dim) % 16 == 0 && row_bytes(e.dtype, e.expert_dim) % 16 == 0
                                            : e.dim % 8 == 0 && e.expert_dim % 2 == 0;
  return e.dtype == MYTHOS_CUDA_FLOAT32 || e.tokens <= kFewTokens || !pieces;
}

namespace {

bool is_valid(const mythos_cuda_experts* e) {
  if (e == nullptr || e->size < sizeof(mythos_cuda_experts)) return false;
  const bool sizes = e->tokens >= 0 && e->dim > 0 && e->expert_dim > 0 && e->top_k >= 0 && e->routed >= e->top_k && e->shared >= 0;
  const bool form = is_valid_form(e->dtype, e->scale_dtype, e->block, e->dim) && is_valid_form(e->dtype, e->scale_dtype, e->block, e->expert_dim);
  // Rows are counted with int inside the kernels.
  return sizes && form && int64_t(e->tokens) * (int64_t(e->top_k) + e->shared) <= INT_MAX / 2;
}

uint64_t few_bytes(const mythos_cuda_experts& e) { return is_quantized(e.dtype) ? few_quantized_workspace(e) : few_workspace(e); }

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
  if (is_few(*e) && e->tokens > kFewTokens) return few_bytes(*e);
  mythos_cuda_experts few = *e;
  few.tokens = std::min(e->tokens, kFewTokens);
  return std::max(few_bytes(few), is_few(*e) ? 0 : many_workspace(*e));
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
    case MYTHOS_CUDA_FLOAT32:
      return launch_few<float>(*e, on);
    default:
      if (is_few(*e)) return launch_few_quantized(*e, on);
      return with_storage(e->dtype, [&](auto storage) { return launch_many<decltype(storage)>(*e, on); });
  }
}

}  // extern "C"
