// What every launch asks of the device.
#include "launch.cuh"

#include <atomic>

namespace mythos::cuda {

namespace {

// Of the current device, ten times the compute capability; 0 where it does not tell.
int capability() {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];  // 0: not asked yet
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) return 0;
  if (known[device] == 0) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return 0;
    known[device] = 10 * major + minor;
  }
  return known[device];
}

}  // namespace

bool overlaps_launches() { return capability() >= 90; }

bool has_clusters() { return capability() >= 90; }

bool has_wgmma() {
#ifdef MYTHOS_CUDA_WGMMA
  return capability() == 90;
#else
  return false;
#endif
}

bool takes_carveouts() {
  constexpr int kFirstDriver = 12050;
  static const bool known = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= kFirstDriver;
  }();
  return known && overlaps_launches();
}

void* tensor_map_encoder() {
  static void* const found = [] {
    constexpr char kName[] = "cuTensorMapEncodeTiled";
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return found;
}

cudaError_t most_shared_bytes(int* bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

}  // namespace mythos::cuda
