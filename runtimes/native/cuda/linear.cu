// Products with one matrix: many tokens in tiles on tensor cores; the C interface of them all.
//
// Shape letters: T tokens, I inputs, O outputs.
#include <climits>

#include "experts.cuh"
#include "launch.cuh"
#include "linear.cuh"
#include "quantized_tiles.cuh"
#include "rounding.cuh"
#include "tiles.cuh"

namespace mythos::cuda {
namespace {

constexpr int kFewTokens = 4;
constexpr int kWantedBlocks = 132;  // for a large GPU to be busy

template <typename W>
struct TokenRows {
  const W* rounded;
  int first, tokens, inputs;

  __device__ __forceinline__ const W* any() const { return rounded; }
  __device__ __forceinline__ int64_t jump() const { return 0; }
  __device__ __forceinline__ int width() const { return inputs; }
  __device__ __forceinline__ const W* operator()(int row) const {
    return first + row < tokens ? rounded + int64_t(first + row) * inputs : nullptr;
  }
};

template <typename Stack>
struct OutputRows {
  Stack stack;
  int first, outputs;

  __device__ __forceinline__ int64_t jump() const { return 0; }
  __device__ __forceinline__ int64_t operator()(int row) const { return first + row < outputs ? first + row : -1; }
};

// Blocks: (kN outputs, kM tokens).
template <typename Stored, int kM, int kN, int kWarpsM, int kDepth, int kStages>
__global__ void __launch_bounds__(kTileThreads) linear_many(Linear a, const Multiplied<Stored>* rounded, StackOf<Stored> weight) {
  using Product = TileOf<Stored, kM, kN, kWarpsM, kDepth, kStages>;
  extern __shared__ __align__(16) unsigned char stages[];
  wait_for_previous();
  const int token0 = blockIdx.y * kM, output0 = blockIdx.x * kN, lane = threadIdx.x % 32;
  Product product;
  product.run(stages, 1, TokenRows<Multiplied<Stored>>{rounded, token0, a.tokens, a.inputs},
              OutputRows<StackOf<Stored>>{weight, output0, a.outputs});
#pragma unroll
  for (int m = 0; m < Product::kMs; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = token0 + Product::first_row() + m * 16 + i / 2 * 8 + lane / 4;
      if (token >= a.tokens) continue;
#pragma unroll
      for (int piece = 0; piece < Product::kNs; ++piece) {
        const int output = output0 + Product::first_column() + piece * 8 + lane % 4 * 2 + i % 2;
        if (output < a.outputs) a.store(token, output, a.added(token, output) + product.sum[m][piece][i]);
      }
    }
}

template <typename Stored, int kM, int kN, int kWarpsM, int kDepth, int kStages>
cudaError_t launch_many(const mythos_cuda_linear& a, const Multiplied<Stored>* rounded, cudaStream_t stream) {
  const auto kernel = linear_many<Stored, kM, kN, kWarpsM, kDepth, kStages>;
  constexpr int kBytes = TileOf<Stored, kM, kN, kWarpsM, kDepth, kStages>::kSharedBytes;
  const dim3 blocks(ceil_div(a.outputs, kN), ceil_div(a.tokens, kM));
  return launch_kernel(kernel, blocks, kTileThreads, kBytes, stream, sizes_of(a), rounded,
                       make_stack<Stored>(a.weight, a.scales, a.dtype, a.scale_dtype, a.block, a.inputs));
}

bool is_few(const mythos_cuda_linear& a) {
  const bool pieces = !is_quantized(a.dtype) || row_bytes(a.dtype, a.inputs) % 16 == 0;
  return a.dtype == MYTHOS_CUDA_FLOAT32 || a.tokens <= kFewTokens || a.inputs % kPiece != 0 || !pieces;
}

template <typename Stored>
cudaError_t launch(const mythos_cuda_linear& a, cudaStream_t stream) {
  if constexpr (!kQuantized<Stored>) {
    if (is_few(a)) return launch_few<Stored>(a, stream);
  }
  if constexpr (!std::is_same_v<Stored, float>) {
    auto* rounded = Arena(a.workspace).take<Multiplied<Stored>>(uint64_t(a.tokens) * a.inputs);
    const cudaError_t error = round_tokens(a.x, a.norm, a.epsilon, a.tokens, a.inputs, rounded, stream);
    if (error != cudaSuccess) return error;
    if (a.tokens <= 16) return launch_many<Stored, 16, 64, 1, 128, 3>(a, rounded, stream);
    const bool small = ceil_div(a.tokens, 128) * ceil_div(a.outputs, 128) < kWantedBlocks;
    return small ? launch_many<Stored, 128, 64, 2, 64, 3>(a, rounded, stream) : launch_many<Stored, 128, 128, 2, 64, 2>(a, rounded, stream);
  }
  return cudaErrorInvalidValue;
}

bool is_valid(const mythos_cuda_linear* a) {
  return a != nullptr && a->size >= sizeof(*a) && is_valid_form(a->dtype, a->scale_dtype, a->block, a->inputs) && a->tokens >= 0 &&
         a->inputs > 0 && a->inputs <= (kFewSharedBytes / int(sizeof(float)) - 64) && a->outputs > 0 && a->split >= 0 &&
         a->split < a->outputs && (a->split == 0 || a->residual == nullptr);
}

}  // namespace
}  // namespace mythos::cuda

using namespace mythos::cuda;

extern "C" {

__attribute__((visibility("default"))) uint64_t mythos_cuda_linear_workspace(const mythos_cuda_linear* a) {
  if (!is_valid(a)) return 0;
  Arena arena(nullptr);
  arena.take<uint16_t>(is_few(*a) ? 1 : uint64_t(a->tokens) * a->inputs);
  return arena.used();
}

__attribute__((visibility("default"))) int32_t mythos_cuda_linear_launch(const mythos_cuda_linear* a, void* stream) {
  if (!is_valid(a) || a->workspace_bytes < mythos_cuda_linear_workspace(a)) return cudaErrorInvalidValue;
  if (a->tokens == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a->dtype) {
    case MYTHOS_CUDA_FLOAT16:
      return launch<__half>(*a, on);
    case MYTHOS_CUDA_BFLOAT16:
      return launch<__nv_bfloat16>(*a, on);
    case MYTHOS_CUDA_FLOAT32:
      return launch<float>(*a, on);
    default:
      if (is_few(*a)) return launch_few_quantized(*a, on);
      return with_storage(a->dtype, [&](auto storage) { return launch<decltype(storage)>(*a, on); });
  }
}

}  // extern "C"
