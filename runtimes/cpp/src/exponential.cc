#include "exponential.h"

#include <cstdint>
#include <cstring>

namespace mythos {
namespace {

constexpr double kFactorials[] = {479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};  // of 12 down to 0

// exp(x) = 2^k · exp(r), |r| at most ln(2) / 2, whose Taylor series ends below the last place at r^13. Nothing branches, so that
// compilers make vectors of it.
inline __attribute__((always_inline)) double exponential(double x) {
  constexpr double kLog2e = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;
  constexpr double kToInteger = 0x1.8p52;  // added, it leaves an integer in the lowest bits
  const double shifted = x * kLog2e + kToInteger;
  const double k = shifted - kToInteger;
  const double r = (x - k * kLn2High) - k * kLn2Low;
  double series = 1.0 / 6227020800;
  for (const double factorial : kFactorials) series = series * r + 1 / factorial;
  uint64_t exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 52) + 0x3FF0000000000000u;
  double power, result;
  std::memcpy(&power, &exponent, sizeof power);
  result = series * power;
  std::memcpy(&bits, &result, sizeof bits);
  bits &= x < -707.5 ? uint64_t{0} : ~uint64_t{0};
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline __attribute__((always_inline)) double all(const double* x, size_t n, double* results) {
  for (size_t i = 0; i < n; ++i) results[i] = exponential(x[i]);
  constexpr size_t kLanes = 8;  // one sum would wait for each addition
  double parts[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) parts[lane] += results[i + lane];
  for (; i < n; ++i) parts[0] += results[i];
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) double all_avx512(const double* x, size_t n, double* results) { return all(x, n, results); }
__attribute__((target("avx2,fma"))) double all_avx2(const double* x, size_t n, double* results) { return all(x, n, results); }
#endif

}  // namespace

double exponentials(const double* x, size_t n, double* results) {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512f"), avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return all_avx512(x, n, results);
  if (avx2) return all_avx2(x, n, results);
#endif
  return all(x, n, results);
}

}  // namespace mythos
