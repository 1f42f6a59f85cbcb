// Blocks of a cluster, which write to one another's shared memory (compute capability 9.0 and later).
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "barriers.cuh"

namespace mythos::cuda {

// This block's place in its cluster.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}

// All threads of a cluster arrive, then wait: before that no other block may be written to.
__device__ __forceinline__ void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where a block has what this one has at `own`, an address in shared memory.
__device__ __forceinline__ uint32_t address_in_block(uint32_t own, int rank) {
  uint32_t address = own;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
#endif
  return address;
}

// An mbarrier that opens when so many bytes have come from the blocks of a cluster; used once. `barrier`: an address in shared memory.
class Delivery {
 public:
  __device__ __forceinline__ explicit Delivery(uint32_t barrier) : barrier_(barrier) {}

  // By one thread, before it arrives in the cluster.
  __device__ __forceinline__ void expect(uint32_t bytes) const {
    barrier_.begin(1);
    barrier_.expect(bytes);
    show_barriers();
  }
  // To another block's memory, at what is `own` here.
  __device__ __forceinline__ void send(uint32_t own, int rank, uint32_t bits) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address_in_block(own, rank)), "r"(bits),
                 "r"(address_in_block(barrier_.address(), rank))
                 : "memory");
#endif
  }
  __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .pred done;\n\tAGAIN:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n\t@done bra.uni DONE;\n\t"
        "bra.uni AGAIN;\n\tDONE:\n\t}" ::"r"(barrier_.address())
        : "memory");
#endif
  }

 private:
  Barrier barrier_;
};

}  // namespace mythos::cuda
