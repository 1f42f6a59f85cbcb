// Attention's C interface: checks, which kernels run, and where they keep what they hand on. Shape letters: those of attention.cuh.
#include "attention.cuh"

#include <algorithm>

#include "tiles.cuh"

namespace mythos::cuda {
namespace {

constexpr int kLeastPart = 128;    // rows that are worth a block
constexpr int kManyQueries = 64;   // of a sequence and group
constexpr int kManyTokens = 16;

Shape shape_of(const mythos_cuda_attention& a) {
  const bool latent = a.n_kv_heads == 0;
  Shape n;
  n.batch = a.batch, n.seq = a.seq, n.n_heads = a.n_heads, n.capacity = a.capacity, n.window = a.window, n.scale = a.scale;
  n.groups = latent ? 1 : a.n_kv_heads;
  n.heads = a.n_heads / n.groups;
  n.key_dim = latent ? a.rank + a.rope : a.v_head_dim;
  n.value_dim = latent ? a.rank : a.v_head_dim;
  n.width = latent ? a.rank + a.rope : 2 * a.n_kv_heads * a.v_head_dim;
  n.keys_at = 0;
  n.values_at = latent ? 0 : a.n_kv_heads * a.v_head_dim;
  n.step = latent ? 0 : a.v_head_dim;
  // The lengths are on the device: as many parts as the longest sequence that fits may need, or make the GPU busy.
  const bool many = n.queries() >= kManyQueries;
  const int64_t blocks = int64_t(a.batch) * n.groups * ceil_div(n.queries(), many ? 128 : 16);
  const int64_t rows = int64_t(a.capacity) + a.seq, seen = a.window > 0 ? std::min<int64_t>(rows, int64_t(a.window) + a.seq) : rows;
  n.parts = int(std::max<int64_t>(1, std::min<int64_t>((seen + kLeastPart - 1) / kLeastPart, kMostParts / std::max<int64_t>(1, blocks))));
  return n;
}

AttentionWorkspace place(const mythos_cuda_attention& a, const Shape& n, Arena& arena) {
  const uint64_t heads = uint64_t(a.batch) * a.seq * a.n_heads;
  AttentionWorkspace w;
  w.queries = arena.take<float>(heads * n.key_dim);
  w.parts.sums = arena.take<float>(heads * n.parts * n.value_dim);
  w.parts.states = arena.take<float>(heads * n.parts * 2);
  w.rounded = arena.take<uint16_t>(ways_of(a, n).many_tokens ? heads * std::max(a.nope, n.value_dim) : 1);
  return w;
}

template <typename W, typename C>
cudaError_t launch(const mythos_cuda_attention& a, cudaStream_t stream) {
  const Shape n = shape_of(a);
  const Ways ways = ways_of(a, n);
  Arena arena(a.workspace);
  const AttentionWorkspace w = place(a, n, arena);
  cudaError_t error = make_queries<W, C>(a, n, ways, w, stream);
  if (error != cudaSuccess) return error;
  if constexpr (std::is_same_v<C, float>) error = attend_plainly<C>(a, n, w, stream);
  else if (!ways.tensor_cores) error = attend_plainly<C>(a, n, w, stream);
  else if (ways.many_queries) error = attend_many<C>(a, n, w, stream);
  else if constexpr (std::is_same_v<C, int8_t>) error = attend_few<C>(a, n, w, stream);
  else error = ways.wide_tiles ? attend_latents_few<C>(a, n, w, stream) : attend_few<C>(a, n, w, stream);
  return error != cudaSuccess ? error : put_together<W>(a, n, ways, w, stream);
}

template <typename W>
cudaError_t launch(const mythos_cuda_attention& a, cudaStream_t stream) {
  switch (a.cache_dtype) {
    case MYTHOS_CUDA_FLOAT16:
      return launch<W, __half>(a, stream);
    case MYTHOS_CUDA_BFLOAT16:
      return launch<W, __nv_bfloat16>(a, stream);
    case MYTHOS_CUDA_INT8:
      return launch<W, int8_t>(a, stream);
    default:
      return launch<W, float>(a, stream);
  }
}

bool is_valid(const mythos_cuda_attention* a) {
  if (a == nullptr || a->size < sizeof(mythos_cuda_attention)) return false;
  const auto known = [](int dtype) { return dtype >= MYTHOS_CUDA_FLOAT32 && dtype <= MYTHOS_CUDA_BFLOAT16; };
  const bool latent = a->n_kv_heads == 0;
  const bool sizes = a->batch >= 0 && a->seq >= 0 && a->n_heads > 0 && a->v_head_dim > 0 && a->capacity >= 0 && a->window >= 0;
  const bool dims = latent ? a->rank > 0 && a->rank <= 512 && a->nope > 0 && a->rope >= 0 && a->rope % 2 == 0
                           : a->n_kv_heads > 0 && a->n_heads % a->n_kv_heads == 0 && a->v_head_dim <= 512 && a->v_head_dim % 2 == 0;
  const bool cache = known(a->cache_dtype) || (a->cache_dtype == MYTHOS_CUDA_INT8 && a->row_scale >= 0.0f);
  return known(a->dtype) && cache && sizes && dims && int64_t(a->batch) * a->seq <= 65535;
}

}  // namespace

// Keys of whole sixteens; values that the warps of a unit, two where there are more than 256 channels, share out in sixteens.
Ways ways_of(const mythos_cuda_attention& a, const Shape& n) {
  Ways ways;
  const int value_unit = n.value_dim > 256 ? 32 : 16;
  ways.tensor_cores = a.cache_dtype != MYTHOS_CUDA_FLOAT32 && n.key_dim % 16 == 0 && n.value_dim % value_unit == 0 && n.width % kPiece == 0;
  ways.many_queries = ways.tensor_cores && n.queries() >= kManyQueries;
  ways.many_tokens = ways.tensor_cores && a.n_kv_heads == 0 && a.dtype != MYTHOS_CUDA_FLOAT32 && a.batch * a.seq >= kManyTokens &&
                     a.nope % kPiece == 0 && a.rank % kPiece == 0;
  // Of shorter contexts no faster on an H100.
  ways.wide_tiles = ways.tensor_cores && !ways.many_queries && n.has_many_parts() && takes_latents(a, n);
  return ways;
}

}  // namespace mythos::cuda

using namespace mythos::cuda;

extern "C" {

__attribute__((visibility("default"))) uint64_t mythos_cuda_attention_workspace(const mythos_cuda_attention* a) {
  if (!is_valid(a)) return 0;
  Arena arena(nullptr);
  place(*a, shape_of(*a), arena);
  return arena.used();
}

__attribute__((visibility("default"))) int32_t mythos_cuda_attention_launch(const mythos_cuda_attention* a, void* stream) {
  if (!is_valid(a) || a->workspace_bytes < mythos_cuda_attention_workspace(a)) return cudaErrorInvalidValue;
  if (a->batch == 0 || a->seq == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a->dtype) {
    case MYTHOS_CUDA_FLOAT16:
      return launch<__half>(*a, on);
    case MYTHOS_CUDA_BFLOAT16:
      return launch<__nv_bfloat16>(*a, on);
    default:
      return launch<float>(*a, on);
  }
}

}  // extern "C"
