// bfloat16 as its 16 bits: the upper half of an IEEE binary32.
#pragma once

#include <cstdint>
#include <cstring>

namespace kt_expert {

using bf16_t = std::uint16_t;

inline float bf16_to_float(bf16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN, as torch's cast does.
inline bf16_t float_to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  constexpr std::uint32_t kQuietNan = 0x7FC0;
  constexpr std::uint32_t kRoundingBias = 0x7FFF;
  const std::uint32_t rounded = (bits + kRoundingBias + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<bf16_t>(is_nan ? kQuietNan : rounded);
}

}  // namespace kt_expert
