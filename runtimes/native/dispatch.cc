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
static bool Always() { return true; }

// A table and whether this processor runs it.
struct Choice {
  const Kernels* kernels;
  bool (*runs)();
};

#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
extern const Kernels avx512_vnni;
extern const Kernels avx512_bf16;

static bool HasAvx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
}
static bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
static bool HasAvx512Vnni() {
  return HasAvx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") &&
         __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("vpclmulqdq");
}
static bool HasAvx512Bf16() { return HasAvx512Vnni() && __builtin_cpu_supports("avx512bf16"); }

static const Choice kChoices[] = {
    {&avx512_bf16, HasAvx512Bf16}, {&avx512_vnni, HasAvx512Vnni}, {&avx512, HasAvx512}, {&avx2, HasAvx2}, {&scalar, Always},
};
#elif defined(__aarch64__)
extern const Kernels neon;
extern const Kernels neon_dotprod;
extern const Kernels neon_i8mm;

static bool HasDotprod() {
  const unsigned long has = getauxval(AT_HWCAP);
  return (has & HWCAP_ASIMDDP) && (has & HWCAP_ASIMDHP);
}
static const Choice kChoices[] = {
#if defined(MYTHOS_NEON_I8MM)
    {&neon_i8mm,
     [] {
       const unsigned long has = getauxval(AT_HWCAP2);
       return HasDotprod() && (has & HWCAP2_I8MM) && (has & HWCAP2_BF16);
     }},
#endif
    {&neon_dotprod, HasDotprod}, {&neon, Always}, {&scalar, Always},
};
#else
static const Choice kChoices[] = {{&scalar, Always}};
#endif

static const Kernels* Best() {
  for (const Choice& choice : kChoices)
    if (choice.runs()) return choice.kernels;
  return &scalar;
}

static std::atomic<const Kernels*>& Current() {
  static std::atomic<const Kernels*> current{Best()};
  return current;
}

const Kernels& CurrentKernels() { return *Current().load(std::memory_order_relaxed); }

bool UseKernels(const char* name) {
  for (const Choice& choice : kChoices)
    if (choice.runs() && std::strcmp(choice.kernels->name, name) == 0) {
      Current().store(choice.kernels, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace mythos
