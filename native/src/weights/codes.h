// Codes of the quantised formats: what a code means, and which code is nearest to a value.
#pragma once

#include <cstdint>

#include "kt_expert/weight_format.h"

namespace kt_expert {

constexpr int kInt4Offset = 8;  // int4 codes are stored as value + 8
constexpr float kInt8Max = 127.0f;
constexpr float kInt4Max = 7.0f;
constexpr float kFp8Max = 448.0f;  // largest finite E4M3
constexpr float kMxfp4Max = 6.0f;  // largest E2M1
constexpr int kE8m0Bias = 127;
constexpr int kE8m0Nan = 255;
// Kernels multiply an E4M3 code read as fp32 bits by 2^120 times its scale, which must stay finite.
constexpr float kFp8ScaleLimit = 128.0f;

constexpr float kMxfp4Values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// arXiv:2305.14314, appendix E.
constexpr float kNf4Values[16] = {-1.0f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.0f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.0f};

float decode_fp8(std::uint8_t code);
bool is_fp8_nan(std::uint8_t code);

// The unscaled value of a code as it is stored.
float decode_code(WeightFormat format, std::uint8_t code);
// The nearest code to an unscaled value; ties go to the even code.
std::uint8_t encode_code(WeightFormat format, float value);

// The scale a group with this largest magnitude gets, as stored, and what a stored scale means.
std::uint32_t encode_scale(WeightFormat format, float largest);
float decode_scale(WeightFormat format, const std::uint8_t* stored);

}  // namespace kt_expert
