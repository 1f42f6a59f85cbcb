// Which instruction set this processor has: the newest table it can run.
#include <atomic>
#include <cstring>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace mythos {

extern const Kernels scalar;
#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
extern const Kernels avx512_vnni;

static bool Runs(const Kernels& kernels) {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                        __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  if (&kernels == &avx512) return has_avx512;
  if (&kernels == &avx512_vnni)
    return has_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("vpclmulqdq");
  return &kernels == &scalar || has_avx2;
}
static const Kernels* const kTables[] = {&avx512_vnni, &avx512, &avx2, &scalar};
#elif defined(__aarch64__)
extern const Kernels neon;
extern const Kernels neon_dotprod;

static bool Runs(const Kernels& kernels) {
  const unsigned long has = getauxval(AT_HWCAP);
  return &kernels != &neon_dotprod || ((has & HWCAP_ASIMDDP) && (has & HWCAP_ASIMDHP));
}
static const Kernels* const kTables[] = {&neon_dotprod, &neon, &scalar};
#else
static bool Runs(const Kernels&) { return true; }
static const Kernels* const kTables[] = {&scalar};
#endif

static const Kernels* Best() {
  for (const Kernels* table : kTables)
    if (Runs(*table)) return table;
  return &scalar;
}

static std::atomic<const Kernels*>& Current() {
  static std::atomic<const Kernels*> current{Best()};
  return current;
}

const Kernels& CurrentKernels() { return *Current().load(std::memory_order_relaxed); }

bool UseKernels(const char* name) {
  for (const Kernels* table : kTables)
    if (Runs(*table) && std::strcmp(table->name, name) == 0) {
      Current().store(table, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace mythos
