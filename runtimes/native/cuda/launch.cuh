// Launches that begin while the kernel before them ends (programmatic dependent launch, compute capability 9.0 and later).
//
// Every kernel calls wait_for_previous() before it reads what another one wrote, or writes at all; constants, as weights are, may be
// read before. A kernel is complete when all of its blocks are, so all of them wait, those without work too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace mythos::cuda {

// Lets the next kernel's blocks start, and wait, as soon as there is room for them.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same, and returns when the kernels before this one are complete.
__device__ __forceinline__ void wait_for_previous() {
  let_next_start();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A number that another kernel may be writing; what that one wrote before is seen by copies that are begun afterwards.
__device__ __forceinline__ int64_t load_acquired(const int64_t* from) {
  int64_t value;
  asm volatile("ld.acquire.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
  return value;
}

// Asks for a block's share of what lies in [from, from + bytes) to be in the second-level cache: of what never changes, before the wait.
__device__ __forceinline__ void prefetch(const void* from, int64_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int64_t kChunk = 4096, kUnit = 16;
  const char* const first = static_cast<const char*>(from) - reinterpret_cast<uintptr_t>(from) % kUnit;
  bytes -= bytes % kUnit;
#pragma unroll 1
  for (int64_t at = threadIdx.x * kChunk; at < bytes; at += blockDim.x * kChunk)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first + at), "r"(uint32_t(min(kChunk, bytes - at))));
#else
  constexpr int64_t kLine = 128;
#pragma unroll 1
  for (int64_t at = threadIdx.x * kLine; at < bytes; at += blockDim.x * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
#endif
}

// Asks for this block's share of what lies in [from, from + bytes), of `blocks` shares.
__device__ __forceinline__ void prefetch_share(const void* from, int64_t bytes, int block, int blocks) {
  constexpr int64_t kLine = 128;
  const int64_t share = (bytes / blocks + kLine - 1) / kLine * kLine, first = share * block;
  if (first < bytes) prefetch(static_cast<const char*>(from) + first, min(share, bytes - first));
}

// Whether the current device overlaps launches, has clusters of blocks, and runs this library's code for sm_90a; asked once a device.
bool overlaps_launches();
bool has_clusters();
bool has_wgmma();
// Whether a launch on it may say how a multiprocessor's memory is parted: asked for where launches overlap, known to drivers of CUDA 12.5.
bool takes_carveouts();
// The driver's cuTensorMapEncodeTiled, null where it has none.
void* tensor_map_encoder();
// The most shared memory of a block on the current device.
cudaError_t most_shared_bytes(int* bytes);

// What a launch may ask for. cluster: blocks side by side in x that share their shared memory; more than one where has_clusters().
// beside_large: kernels that want much shared memory start beside it. A multiprocessor parts its memory anew only when nothing runs on it:
// one that wants much would wait for the end of one that wants little.
struct Launch {
  int cluster = 1;
  bool beside_large = false;
};

// bytes: of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(const Launch& how, void (*kernel)(Parameters...), dim3 blocks, int threads, size_t bytes, cudaStream_t stream,
                          Arguments&&... arguments) {
  constexpr size_t kAlwaysThere = 48 * 1024;
  if (bytes > kAlwaysThere) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes, config.stream = stream, config.attrs = attributes;
  if (overlaps_launches()) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
#if CUDART_VERSION >= 12050
  if (how.beside_large && takes_carveouts()) {
    cudaLaunchAttribute& shared = attributes[config.numAttrs++];
    shared.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    shared.val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  }
#endif
  if (how.cluster > 1) {
    cudaLaunchAttribute& together = attributes[config.numAttrs++];
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = how.cluster, together.val.clusterDim.y = 1, together.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t bytes, cudaStream_t stream,
                          Arguments&&... arguments) {
  return launch_kernel(Launch(), kernel, blocks, threads, bytes, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace mythos::cuda
