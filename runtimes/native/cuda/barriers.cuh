// mbarriers: counters in shared memory that warps, and copies that run by themselves, tell when data is there (compute capability 9.0 and
// later). A barrier's phases are numbered from 0; phase i is over when everyone has arrived for the (i + 1)th time.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace mythos::cuda {

// One of them; `address` in shared memory, of 8 bytes.
class Barrier {
 public:
  __device__ __forceinline__ explicit Barrier(uint32_t address) : address_(address) {}
  __device__ __forceinline__ uint32_t address() const { return address_; }

  // By one thread, before all others meet. arrivals: that end a phase.
  __device__ __forceinline__ void begin(int arrivals) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address_), "r"(arrivals) : "memory");
#endif
  }
  // What this thread wrote before is there for who waits.
  __device__ __forceinline__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address_) : "memory");
#endif
  }
  // The same, where the phase also takes so many bytes of copies.
  __device__ __forceinline__ void expect(uint32_t bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_), "r"(bytes) : "memory");
#endif
  }
  // Once for a warp, for what all of its threads wrote.
  __device__ __forceinline__ void arrive_as_warp() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive();
  }
  __device__ __forceinline__ bool is_over(int phase) const {
    uint32_t over = 1;
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred over;\n\tmbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n\tselp.u32 %0, 1, 0, over;\n\t}"
                 : "=r"(over)
                 : "r"(address_), "r"(phase & 1)
                 : "memory");
#endif
    return over != 0;
  }
  __device__ __forceinline__ void wait(int phase) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .pred over;\n\tAGAIN:\n\tmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n\t@over bra.uni OVER;\n\t"
        "bra.uni AGAIN;\n\tOVER:\n\t}" ::"r"(address_),
        "r"(phase & 1)
        : "memory");
#endif
  }

 private:
  uint32_t address_;
};

// Makes barriers that have begun known to copies and clusters.
__device__ __forceinline__ void show_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

}  // namespace mythos::cuda
