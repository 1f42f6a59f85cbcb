// Experts on many tokens: tokens are grouped by expert, and each group is a product of its own on tensor cores.
//
// Inner rows are those that the experts' first product gives: of routed experts in groups, one expert's after another's, then of
// each shared expert all tokens'. Shape letters: T tokens, D dim, E routed experts, S shared experts, K top_k, F expert_dim.
#include <algorithm>

#include "experts.cuh"
#include "launch.cuh"
#include "numbers.cuh"
#include "quantized_tiles.cuh"
#include "rounding.cuh"
#include "tiles.cuh"
#include "tiles_hopper.cuh"

namespace mythos::cuda {
namespace {

constexpr int kGroupingThreads = 1024;
constexpr int kEnoughBlocks = 256;  // for any GPU to be busy
constexpr int kLeastRows = 16, kMostRows = 128, kMostColumns = 128;  // of a tile
constexpr int kEnoughWideTiles = 64;  // of 256 columns: fewer leave more of the GPU idle than they gain

// Rows of a tile, and which expert they are for: inner rows first to first + count of all, or of a shared expert's.
struct Group {
  int expert, first, count;
};

// Rows of tiles, of routed and of shared experts, and columns of both.
struct Shape {
  int routed, shared, columns;
};

struct Workspace {
  void* rounded;        // [T, D] of the stacks' dtype
  void* inner;          // [TK + ST, F] of the stacks' dtype
  float* outer;         // [TK, D]: of each inner row of routed experts
  float* outer_shared;  // [parts, T, D]: sums of shared experts
  int* token_of;        // [TK]: of an inner row
  int* row_of;          // [TK]: of a pair
  Group* groups;        // of routed experts, a tile each
  int* n_groups;
  int most_groups;
  int parts;            // S where each shared expert's product stands alone, 1 where they are summed at once, 0 without any
};

// Tokens of each routed expert on average; they see few of all.
int tokens_of_each(const mythos_cuda_experts& e) { return e.routed ? int(pairs(e) / e.routed) : e.tokens; }

template <typename Stored>
using Wide = WideTile<Stored, kMostRows, 4>;

// Whether tiles are Wide ones on the current device. The workspace takes as much where they are not.
bool takes_wide(const mythos_cuda_experts& e) {
  constexpr int kColumns = Wide<__half>::kN;
  if (is_quantized(e.dtype) || e.tokens <= 16 || tokens_of_each(e) <= 8 || e.expert_dim % kPiece != 0 || !has_wgmma()) return false;
  const int64_t tiles = int64_t(ceil_div(e.tokens, kMostRows)) * e.shared + e.routed;
  return tiles * std::min(ceil_div(e.expert_dim, kColumns / 2), ceil_div(e.dim, kColumns)) >= kEnoughWideTiles;
}

Shape shape_of(const mythos_cuda_experts& e) {
  const int each = tokens_of_each(e);
  if (e.tokens <= 16) return {16, 16, 64};
  if (each <= 8) return {16, 64, 64};
  if (each > 40 || takes_wide(e)) return {128, 128, 128};
  return {each <= 16 ? 32 : 64, 128, 128};
}

Workspace place(const mythos_cuda_experts& e, Arena& arena) {
  const Shape shape = shape_of(e);
  const int64_t all = pairs(e) / shape.routed + e.routed, each = pairs(e);
  const int blocks = ceil_div(e.tokens, shape.shared) * ceil_div(e.dim, shape.columns);
  Workspace w;
  w.most_groups = int(all < each ? all : each);
  w.parts = blocks < kEnoughBlocks || e.shared == 0 ? e.shared : 1;
  // Room that grows with the tokens, although the parts become one from some number on: that many tokens' parts stay.
  const uint64_t apart = std::min(uint64_t(e.tokens), uint64_t(kEnoughBlocks) * kMostRows / ceil_div(e.dim, kMostColumns));
  const uint64_t shared_rows = std::max(uint64_t(w.parts) * e.tokens, e.shared * apart);
  w.rounded = arena.take<uint16_t>(uint64_t(e.tokens) * e.dim);
  w.inner = arena.take<uint16_t>(inner_rows(e) * e.expert_dim);
  w.outer = arena.take<float>(pairs(e) * e.dim);
  w.outer_shared = arena.take<float>(shared_rows * e.dim);
  w.token_of = arena.take<int>(pairs(e));
  w.row_of = arena.take<int>(pairs(e));
  w.groups = arena.take<Group>(pairs(e) / kLeastRows + e.routed);
  w.n_groups = arena.take<int>(1);
  return w;
}

// One block: counts the pairs of each expert, gives every pair an inner row, and every tile its rows.
__global__ void __launch_bounds__(kGroupingThreads) group_tokens(Sizes n, const int32_t* chosen, int tile_rows, Workspace w) {
  extern __shared__ int next_row[];  // [E], and behind it counts [E]
  int* count = next_row + n.routed;
  wait_for_previous();
  const int pairs = n.tokens * n.top_k;
  for (int expert = threadIdx.x; expert < n.routed; expert += kGroupingThreads) count[expert] = 0;
  __syncthreads();
  for (int pair = threadIdx.x; pair < pairs; pair += kGroupingThreads) atomicAdd(&count[clamp_expert(chosen[pair], n)], 1);
  __syncthreads();
  if (threadIdx.x < 32) {  // a warp's running sums over the experts
    int rows = 0, groups = 0;
    for (int from = 0; from < n.routed; from += 32) {
      const int expert = from + threadIdx.x, mine = expert < n.routed ? count[expert] : 0;
      const int mine_groups = (mine + tile_rows - 1) / tile_rows;
      int row = mine, group = mine_groups;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int row_before = __shfl_up_sync(0xffffffffu, row, distance), group_before = __shfl_up_sync(0xffffffffu, group, distance);
        if (threadIdx.x >= distance) row += row_before, group += group_before;
      }
      const int first = rows + row - mine, first_group = groups + group - mine_groups;
      if (expert < n.routed) {
        next_row[expert] = first;
        for (int i = 0; i < mine_groups; ++i)
          w.groups[first_group + i] = {expert, first + i * tile_rows, min(tile_rows, mine - i * tile_rows)};
      }
      rows += __shfl_sync(0xffffffffu, row, 31), groups += __shfl_sync(0xffffffffu, group, 31);
    }
    if (threadIdx.x == 0) *w.n_groups = groups;
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < pairs; pair += kGroupingThreads) {
    const int row = atomicAdd(&next_row[clamp_expert(chosen[pair], n)], 1);
    w.row_of[pair] = row;
    w.token_of[row] = pair / n.top_k;
  }
}

// Tokens as rows, D wide. Of routed experts the tokens of inner rows.
template <typename W>
struct TokenRows {
  const W* rounded;
  const int* token_of;
  Group group;
  int dim;

  __device__ __forceinline__ const W* any() const { return rounded; }
  __device__ __forceinline__ int64_t jump() const { return 0; }
  __device__ __forceinline__ int width() const { return dim; }
  __device__ __forceinline__ const W* operator()(int row) const {
    if (row >= group.count) return nullptr;
    const int at = group.first + row;
    return rounded + int64_t(token_of != nullptr ? token_of[at] : at) * dim;
  }
};

// Rows of gate and of up of an expert, eight of each in turn, so that a thread holds both of a number.
template <typename Stack>
struct GateUpRows {
  Stack stack;
  int expert, first, expert_dim;

  __device__ __forceinline__ int64_t jump() const { return 0; }
  __device__ __forceinline__ int64_t operator()(int row) const {
    const int f = first + row / 16 * 8 + row % 8;
    return f < expert_dim ? int64_t(2 * expert + row / 8 % 2) * expert_dim + f : -1;
  }
};

// inner [count, F] = silu(gate . x) * (up . x) of a group's rows, columns first to first + half of the tile's.
template <typename W, typename Product, typename Stack>
__device__ __forceinline__ void inner_tile(const Sizes& n, const TokenRows<W>& left, const Stack& gate_up, int first, W* inner) {
  extern __shared__ __align__(16) unsigned char memory[];
  Product product;
  product.run(memory, 1, left, GateUpRows<Stack>{gate_up, left.group.expert, first, n.expert_dim});
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Product::kMs; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Product::first_row() + m * 16 + half * 8 + lane / 4;
      if (row >= left.group.count) continue;
#pragma unroll
      for (int pair = 0; pair < Product::kNs / 2; ++pair) {
        const int f = first + Product::first_column() / 2 + pair * 8 + lane % 4 * 2;
        if (f >= n.expert_dim) continue;
        const auto &gate = product.sum[m][2 * pair], &up = product.sum[m][2 * pair + 1];
        const W two[2] = {from_float<W>(silu(gate[2 * half]) * up[2 * half]), from_float<W>(silu(gate[2 * half + 1]) * up[2 * half + 1])};
        *reinterpret_cast<uint32_t*>(inner + int64_t(row) * n.expert_dim + f) = *reinterpret_cast<const uint32_t*>(two);
      }
    }
}

// Blocks: (columns of F, tiles of shared experts and groups of routed ones).
template <typename Stored, typename Routed, typename Shared, int kRows, int kColumns>
__global__ void __launch_bounds__(Routed::kThreads)
    inner_many(Sizes n, StackOf<Stored> gate_up_routed, StackOf<Stored> gate_up_shared, Workspace w) {
  using W = Multiplied<Stored>;
  wait_for_previous();
  const int first = blockIdx.x * (kColumns / 2), tiles = (n.tokens + kRows - 1) / kRows;
  const W* rounded = static_cast<const W*>(w.rounded);
  W* inner = static_cast<W*>(w.inner);
  if (int(blockIdx.y) < tiles * n.shared) {
    const int expert = blockIdx.y / tiles, from = blockIdx.y % tiles * kRows;
    const int64_t row = int64_t(n.tokens) * (n.top_k + expert) + from;
    const TokenRows<W> left{rounded, nullptr, {expert, from, min(kRows, n.tokens - from)}, n.dim};
    inner_tile<W, Shared>(n, left, gate_up_shared, first, inner + row * n.expert_dim);
  } else if (int(blockIdx.y) - tiles * n.shared < *w.n_groups) {
    const Group group = w.groups[blockIdx.y - tiles * n.shared];
    const TokenRows<W> left{rounded, w.token_of, group, n.dim};
    inner_tile<W, Routed>(n, left, gate_up_routed, first, inner + int64_t(group.first) * n.expert_dim);
  }
}

// Inner rows, F wide, of one expert or of several, one after another.
template <typename W>
struct InnerRows {
  const W* inner;
  int count, expert_dim;
  int64_t next_expert;

  __device__ __forceinline__ const W* any() const { return inner; }
  __device__ __forceinline__ int64_t jump() const { return next_expert; }
  __device__ __forceinline__ int width() const { return expert_dim; }
  __device__ __forceinline__ const W* operator()(int row) const {
    return row < count ? inner + int64_t(row) * expert_dim : nullptr;
  }
};

// Rows of down of an expert, or of several, one after another.
template <typename Stack>
struct DownRows {
  Stack stack;
  int expert, first, dim;

  __device__ __forceinline__ int64_t jump() const { return dim; }
  __device__ __forceinline__ int64_t operator()(int row) const { return first + row < dim ? int64_t(expert) * dim + first + row : -1; }
};

// outer [count, D] = the sum over `experts` experts of down . inner, columns first to first + the tile's.
template <typename W, typename Product, typename Stack>
__device__ __forceinline__ void outer_tile(const Sizes& n, int experts, const InnerRows<W>& left, const Stack& down, int expert, int first,
                                           float* outer) {
  extern __shared__ __align__(16) unsigned char memory[];
  Product product;
  product.run(memory, experts, left, DownRows<Stack>{down, expert, first, n.dim});
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Product::kMs; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Product::first_row() + m * 16 + half * 8 + lane / 4;
      if (row >= left.count) continue;
#pragma unroll
      for (int piece = 0; piece < Product::kNs; ++piece) {
        const int d = first + Product::first_column() + piece * 8 + lane % 4 * 2;
        const auto& sum = product.sum[m][piece];
        if (d < n.dim) *reinterpret_cast<float2*>(outer + int64_t(row) * n.dim + d) = {sum[2 * half], sum[2 * half + 1]};
      }
    }
}

// Blocks: (columns of D, tiles of the shared experts' parts and groups of routed ones).
template <typename Stored, typename Routed, typename Shared, int kRows, int kColumns>
__global__ void __launch_bounds__(Routed::kThreads)
    outer_many(Sizes n, StackOf<Stored> down_routed, StackOf<Stored> down_shared, Workspace w) {
  using W = Multiplied<Stored>;
  wait_for_previous();
  const int first = blockIdx.x * kColumns, tiles = (n.tokens + kRows - 1) / kRows;
  const int64_t rows_of_expert = int64_t(n.tokens) * n.expert_dim;
  const W* inner = static_cast<const W*>(w.inner);
  if (int(blockIdx.y) < tiles * w.parts) {
    const int part = blockIdx.y / tiles, from = blockIdx.y % tiles * kRows;
    const W* rows = inner + (n.top_k + part) * rows_of_expert + int64_t(from) * n.expert_dim;
    const InnerRows<W> left{rows, min(kRows, n.tokens - from), n.expert_dim, rows_of_expert};
    float* outer = w.outer_shared + (int64_t(part) * n.tokens + from) * n.dim;
    outer_tile<W, Shared>(n, n.shared / w.parts, left, down_shared, part, first, outer);
  } else if (int(blockIdx.y) - tiles * w.parts < *w.n_groups) {
    const Group group = w.groups[blockIdx.y - tiles * w.parts];
    const InnerRows<W> left{inner + int64_t(group.first) * n.expert_dim, group.count, n.expert_dim, 0};
    outer_tile<W, Routed>(n, 1, left, down_routed, group.expert, first, w.outer + int64_t(group.first) * n.dim);
  }
}

__device__ __forceinline__ void add_scaled(float4& sum, float scale, const float4& part) {
  sum.x = fmaf(scale, part.x, sum.x), sum.y = fmaf(scale, part.y, sum.y);
  sum.z = fmaf(scale, part.z, sum.z), sum.w = fmaf(scale, part.w, sum.w);
}

// mixed: a block a token.
__global__ void mix(Sizes n, const float* weight, Workspace w, const float* residual, float* mixed) {
  wait_for_previous();
  const int token = blockIdx.x;
  for (int at = threadIdx.x; at < n.dim / 4; at += blockDim.x) {
    const int64_t row = int64_t(token) * n.dim;
    float4 sum = residual != nullptr ? reinterpret_cast<const float4*>(residual + row)[at] : float4{0, 0, 0, 0};
    for (int part = 0; part < w.parts; ++part)
      add_scaled(sum, 1.0f, reinterpret_cast<const float4*>(w.outer_shared + (int64_t(part) * n.tokens + token) * n.dim)[at]);
    for (int rank = 0; rank < n.top_k; ++rank) {
      const int pair = token * n.top_k + rank;
      add_scaled(sum, weight[pair], reinterpret_cast<const float4*>(w.outer + int64_t(w.row_of[pair]) * n.dim)[at]);
    }
    reinterpret_cast<float4*>(mixed + row)[at] = sum;
  }
}

template <typename Stored>
StackOf<Stored> stack_of(const mythos_cuda_experts& e, const void* values, const void* scales, int columns) {
  return make_stack<Stored>(values, scales, e.dtype, e.scale_dtype, e.block, columns);
}

// Both products, in tiles of kShared rows, for routed experts of Routed's.
template <typename Stored, typename Routed, typename Shared, int kShared, int kColumns>
cudaError_t launch_products(const mythos_cuda_experts& e, const Sizes& n, const Workspace& w, cudaStream_t stream) {
  constexpr int kBytes = Routed::kSharedBytes > Shared::kSharedBytes ? Routed::kSharedBytes : Shared::kSharedBytes;
  const auto inner = inner_many<Stored, Routed, Shared, kShared, kColumns>;
  const auto outer = outer_many<Stored, Routed, Shared, kShared, kColumns>;
  const int tiles = ceil_div(n.tokens, kShared);
  const dim3 inner_blocks(ceil_div(n.expert_dim, kColumns / 2), tiles * n.shared + w.most_groups);
  const dim3 outer_blocks(ceil_div(n.dim, kColumns), tiles * w.parts + w.most_groups);
  const cudaError_t error = launch_kernel(inner, inner_blocks, Routed::kThreads, kBytes, stream, n,
                                          stack_of<Stored>(e, e.gate_up_routed, e.gate_up_routed_scales, n.dim),
                                          stack_of<Stored>(e, e.gate_up_shared, e.gate_up_shared_scales, n.dim), w);
  if (error != cudaSuccess) return error;
  return launch_kernel(outer, outer_blocks, Routed::kThreads, kBytes, stream, n,
                       stack_of<Stored>(e, e.down_routed, e.down_routed_scales, n.expert_dim),
                       stack_of<Stored>(e, e.down_shared, e.down_shared_scales, n.expert_dim), w);
}

template <typename Stored, int kStages>
cudaError_t launch_wide(const mythos_cuda_experts& e, const Sizes& n, const Workspace& w, cudaStream_t stream) {
  using Rows32 = TileOf<Stored, 32, kMostColumns, 1, 64, kStages>;
  using Rows64 = TileOf<Stored, 64, kMostColumns, 2, 64, kStages>;
  using Rows128 = TileOf<Stored, kMostRows, kMostColumns, 2, 64, kStages>;
  switch (shape_of(e).routed) {
    case 32:
      return launch_products<Stored, Rows32, Rows128, kMostRows, kMostColumns>(e, n, w, stream);
    case 64:
      return launch_products<Stored, Rows64, Rows128, kMostRows, kMostColumns>(e, n, w, stream);
    default:
      return launch_products<Stored, Rows128, Rows128, kMostRows, kMostColumns>(e, n, w, stream);
  }
}

template <typename Stored>
cudaError_t launch_products(const mythos_cuda_experts& e, const Sizes& n, const Workspace& w, cudaStream_t stream) {
  using Rows16 = TileOf<Stored, kLeastRows, 64, 1, 128, 3>;
  using Rows64 = TileOf<Stored, 64, 64, 2, 128, 2>;
  const Shape shape = shape_of(e);
  if (shape.shared == 16) return launch_products<Stored, Rows16, Rows16, 16, 64>(e, n, w, stream);
  if (shape.routed == 16) return launch_products<Stored, Rows16, Rows64, 64, 64>(e, n, w, stream);
  if constexpr (kQuantized<Stored>) {
    return launch_wide<Stored, 2>(e, n, w, stream);
  } else {
    if (takes_wide(e)) return launch_products<Stored, Wide<Stored>, Wide<Stored>, kMostRows, Wide<Stored>::kN>(e, n, w, stream);
    int device, most_shared;
    for (const auto asked : {cudaGetDevice(&device), cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)})
      if (asked != cudaSuccess) return asked;
    // Three stages hide more of memory's latency; not every GPU has room for them.
    const bool fits = Tile<Stored, kMostRows, kMostColumns, 2, 64, 3>::kSharedBytes <= most_shared;
    return fits ? launch_wide<Stored, 3>(e, n, w, stream) : launch_wide<Stored, 2>(e, n, w, stream);
  }
}

}  // namespace

uint64_t many_workspace(const mythos_cuda_experts& e) {
  Arena arena(nullptr);
  place(e, arena);
  return arena.used();
}

template <typename Stored>
cudaError_t launch_many(const mythos_cuda_experts& e, cudaStream_t stream) {
  using W = Multiplied<Stored>;
  const Sizes n = sizes_of(e);
  Arena arena(e.workspace);
  const Workspace w = place(e, arena);
  cudaError_t error = round_tokens(e.normed, e.norm, e.epsilon, n.tokens, n.dim, static_cast<W*>(w.rounded), stream);
  if (error != cudaSuccess) return error;
  error = launch_kernel(group_tokens, 1, kGroupingThreads, 2 * n.routed * sizeof(int), stream, n, e.chosen, shape_of(e).routed, w);
  if (error != cudaSuccess) return error;
  if ((error = launch_products<Stored>(e, n, w, stream)) != cudaSuccess) return error;
  return launch_kernel(mix, n.tokens, 256, 0, stream, n, e.weight, w, e.residual, e.mixed);
}

template cudaError_t launch_many<__half>(const mythos_cuda_experts&, cudaStream_t);
template cudaError_t launch_many<__nv_bfloat16>(const mythos_cuda_experts&, cudaStream_t);
template cudaError_t launch_many<Int4>(const mythos_cuda_experts&, cudaStream_t);
template cudaError_t launch_many<Int8>(const mythos_cuda_experts&, cudaStream_t);
template cudaError_t launch_many<Float8>(const mythos_cuda_experts&, cudaStream_t);

}  // namespace mythos::cuda
