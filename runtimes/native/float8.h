// Numbers of the type float8e4m3fn (arXiv 2209.05433): a sign, four bits of exponent, three of fraction, no infinity.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace mythos {

constexpr float kFloat8Max = 448.0f;

inline float Float8ToFloat(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 127) == 127) return std::numeric_limits<float>::quiet_NaN();
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                   : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
  return bits & 128 ? -size : size;
}

// The nearest of these numbers, ties to even; what is beyond the largest becomes the largest, NaN stays.
inline float RoundToFloat8(float x) {
  if (std::isnan(x)) return x;
  const float within = std::min(kFloat8Max, std::max(-kFloat8Max, x));
  const int exponent = std::max(-6, within == 0.0f ? -6 : std::ilogb(within));
  const float step = std::ldexp(1.0f, exponent - 3);
  return std::nearbyint(within / step) * step;
}

}  // namespace mythos
