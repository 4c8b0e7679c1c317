// Reading blocks of every weight format into YMM registers: eight rows at one depth, as fp32.
//
// Reader<format> holds the scales of half a block's rows; read<i>(words) turns 32-bit words of eight rows into their
// i-th depth. RowReader<format> does the same for eight words of one row.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kt_expert/packed_matrix.h"
#include "weights/codes.h"

namespace kt_expert {
namespace {

constexpr int kHalfRows = 8;  // rows in a YMM register: half a block

inline __m256i load_words(const std::uint8_t* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}

inline __m256 load_f32_scales(const std::uint8_t* scales, int half) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(scales + half * kHalfRows * sizeof(float)));
}

template <WeightFormat kFormat>
struct Reader;

template <>
struct Reader<WeightFormat::kBf16> {
  Reader() = default;
  Reader(const std::uint8_t*, int) {}
  template <int kDepth>
  __m256 read(__m256i words) const {
    if constexpr (kDepth == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
};

// The kDepth-th int8 of every word, as fp32.
template <int kDepth>
__m256 int8_codes(__m256i words) {
  if constexpr (kDepth < 3) words = _mm256_slli_epi32(words, 24 - 8 * kDepth);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 24));
}

template <>
struct Reader<WeightFormat::kInt8> {
  __m256 scale;
  Reader() = default;
  Reader(const std::uint8_t* scales, int half) : scale(load_f32_scales(scales, half)) {}
  template <int kDepth>
  __m256 read(__m256i words) const {
    return _mm256_mul_ps(int8_codes<kDepth>(words), scale);
  }
};

template <>
struct Reader<WeightFormat::kFp8> {
  __m256 scale;
  // The code's exponent and mantissa, moved to the top of an fp32 with bias 127 instead of 7.
  static constexpr float kRebias = 1.329227995784916e36f;  // 2^120
  Reader() = default;
  Reader(const std::uint8_t* scales, int) : scale(_mm256_set1_ps(*reinterpret_cast<const float*>(scales) * kRebias)) {}
  template <int kDepth>
  __m256 read(__m256i words) const {
    __m256i value = words;
    if constexpr (kDepth < 3) value = _mm256_slli_epi32(value, 24 - 8 * kDepth);
    // Sign to bit 31, exponent and mantissa to bits 26..20.
    value = _mm256_and_si256(_mm256_srai_epi32(value, 4), _mm256_set1_epi32(static_cast<int>(0x87F00000u)));
    return _mm256_mul_ps(_mm256_castsi256_ps(value), scale);
  }
};

inline __m256 load_bf16_scales(const std::uint8_t* scales, int half) {
  scales += half * kHalfRows * sizeof(bf16_t);
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

struct Int4Reader {
  __m256 scale, offset;  // value = code * scale + offset in one rounding, the offset -8 scales
  Int4Reader() = default;
  Int4Reader(const std::uint8_t* scales, int half)
      : scale(load_bf16_scales(scales, half)),
        offset(_mm256_mul_ps(scale, _mm256_set1_ps(-static_cast<float>(kInt4Offset)))) {}
  template <int kDepth>
  __m256 read(__m256i words) const {
    __m256i code = kDepth == 0 ? words : _mm256_srli_epi32(words, 4 * kDepth);
    if constexpr (kDepth < 7) code = _mm256_and_si256(code, _mm256_set1_epi32(0xF));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, offset);
  }
};
template <>
struct Reader<WeightFormat::kInt4G32> : Int4Reader {
  using Int4Reader::Int4Reader;
};
template <>
struct Reader<WeightFormat::kInt4G128> : Int4Reader {
  using Int4Reader::Int4Reader;
};

inline __m256 load_e8m0_scales(const std::uint8_t* scales, int half) {
  scales += half * kHalfRows;
  const __m256i exponent = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
  // An exponent of 0 means 2^-127, the subnormal 0x00400000.
  const __m256i tiny =
      _mm256_and_si256(_mm256_cmpeq_epi32(exponent, _mm256_setzero_si256()), _mm256_set1_epi32(0x00400000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(exponent, 23), tiny));
}

template <>
struct Reader<WeightFormat::kMxfp4> {
  __m256 scale;
  Reader() = default;
  Reader(const std::uint8_t* scales, int half) : scale(load_e8m0_scales(scales, half)) {}
  template <int kDepth>
  __m256 read(__m256i words) const {
    const __m256 magnitudes = _mm256_loadu_ps(kMxfp4Values);  // the lookup reads the low three bits of each code
    const __m256i code = kDepth == 0 ? words : _mm256_srli_epi32(words, 4 * kDepth);
    const __m256i sign = _mm256_and_si256(kDepth == 7 ? words : _mm256_slli_epi32(words, 28 - 4 * kDepth),
                                          _mm256_set1_epi32(static_cast<int>(0x80000000u)));
    const __m256 value = _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, code), _mm256_castsi256_ps(sign));
    return _mm256_mul_ps(value, scale);
  }
};

// The kDepth-th NF4 value of every word.
template <int kDepth>
__m256 nf4_values(__m256i words) {
  const __m256i code = kDepth == 0 ? words : _mm256_srli_epi32(words, 4 * kDepth);
  const __m256 upper_half = _mm256_castsi256_ps(kDepth == 7 ? words : _mm256_slli_epi32(words, 28 - 4 * kDepth));
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kNf4Values), code);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kNf4Values + 8), code);
  return _mm256_blendv_ps(low, high, upper_half);
}

template <>
struct Reader<WeightFormat::kNf4> {
  __m256 scale;
  Reader() = default;
  Reader(const std::uint8_t* scales, int half) : scale(load_f32_scales(scales, half)) {}
  template <int kDepth>
  __m256 read(__m256i words) const {
    return _mm256_mul_ps(nf4_values<kDepth>(words), scale);
  }
};

template <WeightFormat kFormat>
struct RowReader;

// Formats whose scales do not differ from row to row.
template <WeightFormat kFormat>
struct UniformRowReader : Reader<kFormat> {
  explicit UniformRowReader(const std::uint8_t* scales) : Reader<kFormat>(scales, 0) {}
  template <int kDepth>
  __m256 read(__m256i words, int) const {
    return Reader<kFormat>::template read<kDepth>(words);
  }
};
template <>
struct RowReader<WeightFormat::kBf16> : UniformRowReader<WeightFormat::kBf16> {
  using UniformRowReader::UniformRowReader;
};
template <>
struct RowReader<WeightFormat::kFp8> : UniformRowReader<WeightFormat::kFp8> {
  using UniformRowReader::UniformRowReader;
};

template <>
struct RowReader<WeightFormat::kInt8> {
  const float* scales;  // of the block's 16 rows
  explicit RowReader(const std::uint8_t* stored) : scales(reinterpret_cast<const float*>(stored)) {}
  template <int kDepth>
  __m256 read(__m256i words, int row) const {
    return _mm256_mul_ps(int8_codes<kDepth>(words), _mm256_broadcast_ss(scales + row));
  }
};

}  // namespace
}  // namespace kt_expert
