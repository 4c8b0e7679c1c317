#include "weights/codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kt_expert/bf16.h"

namespace kt_expert {
namespace {

constexpr std::uint8_t kFp8NanMagnitude = 0x7F;
constexpr int kFp8Bias = 7;
constexpr int kFp8MantissaBits = 3;

std::uint8_t nearest_in(const float (&values)[16], float value) {
  int best = 0;
  for (int code = 1; code < 16; ++code) {
    const float distance = std::fabs(values[code] - value), best_distance = std::fabs(values[best] - value);
    if (distance < best_distance || (distance == best_distance && code % 2 == 0 && best % 2 != 0)) best = code;
  }
  return static_cast<std::uint8_t>(best);
}

std::uint8_t encode_fp8(float value) {
  const float magnitude = std::min(std::fabs(value), kFp8Max);
  // Steps between codes are 2^-3 of the binade, and 2^-9 below the smallest normal 2^-6.
  const int binade = magnitude == 0.0f ? 1 - kFp8Bias : std::max(std::ilogb(magnitude), 1 - kFp8Bias);
  const float step = std::ldexp(1.0f, binade - kFp8MantissaBits);
  const int steps = static_cast<int>(std::nearbyint(magnitude / step));  // 8..16 for normals
  // With 16 steps the carry moves into the exponent by itself.
  const int bits = ((binade + kFp8Bias - 1) << kFp8MantissaBits) + steps;
  return static_cast<std::uint8_t>(bits | (std::signbit(value) ? 0x80 : 0));
}

float round_half_even(float value, float low, float high) { return std::nearbyint(std::clamp(value, low, high)); }

}  // namespace

bool is_fp8_nan(std::uint8_t code) { return (code & kFp8NanMagnitude) == kFp8NanMagnitude; }

float decode_fp8(std::uint8_t code) {
  const int exponent = (code >> kFp8MantissaBits) & 0xF, mantissa = code & 0x7;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), 1 - kFp8Bias - kFp8MantissaBits)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - kFp8Bias - kFp8MantissaBits);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

float decode_code(WeightFormat format, std::uint8_t code) {
  switch (format) {
    case WeightFormat::kInt8:
      return static_cast<float>(static_cast<std::int8_t>(code));
    case WeightFormat::kInt4G32:
    case WeightFormat::kInt4G128:
      return static_cast<float>(code - kInt4Offset);
    case WeightFormat::kFp8:
      return decode_fp8(code);
    case WeightFormat::kMxfp4:
      return kMxfp4Values[code & 0xF];
    case WeightFormat::kNf4:
      return kNf4Values[code & 0xF];
    case WeightFormat::kBf16:
      break;
  }
  return 0.0f;
}

std::uint8_t encode_code(WeightFormat format, float value) {
  switch (format) {
    case WeightFormat::kInt8:
      return static_cast<std::uint8_t>(static_cast<std::int8_t>(round_half_even(value, -kInt8Max, kInt8Max)));
    case WeightFormat::kInt4G32:
    case WeightFormat::kInt4G128:
      return static_cast<std::uint8_t>(static_cast<int>(round_half_even(value, -kInt4Max, kInt4Max)) + kInt4Offset);
    case WeightFormat::kFp8:
      return encode_fp8(value);
    case WeightFormat::kMxfp4:
      return nearest_in(kMxfp4Values, value);
    case WeightFormat::kNf4:
      return nearest_in(kNf4Values, value);
    case WeightFormat::kBf16:
      break;
  }
  return 0;
}

std::uint32_t encode_scale(WeightFormat format, float largest) {
  const auto bits_of_float = [](float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  };
  switch (format) {
    case WeightFormat::kInt8:
      return bits_of_float(largest / kInt8Max);
    case WeightFormat::kFp8:
      return bits_of_float(largest / kFp8Max);
    case WeightFormat::kNf4:
      return bits_of_float(largest);
    case WeightFormat::kInt4G32:
    case WeightFormat::kInt4G128:
      return float_to_bf16(largest / kInt4Max);
    case WeightFormat::kMxfp4: {
      // OCP Microscaling 1.0, 6.3: the exponent of the largest magnitude less that of the largest code (2^2).
      if (largest == 0.0f) return kE8m0Bias;
      return static_cast<std::uint32_t>(std::clamp(std::ilogb(largest) - 2 + kE8m0Bias, 0, kE8m0Nan - 1));
    }
    case WeightFormat::kBf16:
      break;
  }
  return 0;
}

float decode_scale(WeightFormat format, const std::uint8_t* stored) {
  switch (format) {
    case WeightFormat::kMxfp4:
      return std::ldexp(1.0f, *stored - kE8m0Bias);
    case WeightFormat::kInt4G32:
    case WeightFormat::kInt4G128: {
      bf16_t bits;
      std::memcpy(&bits, stored, sizeof bits);
      return bf16_to_float(bits);
    }
    case WeightFormat::kBf16:
      return 1.0f;
    default: {
      float scale;
      std::memcpy(&scale, stored, sizeof scale);
      return scale;
    }
  }
}

}  // namespace kt_expert
