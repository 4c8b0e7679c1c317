// Reading blocks of every weight format into YMM registers: eight rows at one depth, as fp32.
//
// For formats of whole bytes, Reader<format> holds the scales of half a block's rows, and read<i>(words) turns 32-bit
// words of eight rows into their i-th depth; RowReader<format> does the same for eight words of one row. 4-bit formats
// are read a row's word at a time by NibbleRows.
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

inline __m256 load_e8m0_scales(const std::uint8_t* scales, int half) {
  scales += half * kHalfRows;
  const __m256i exponent = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
  // An exponent of 0 means 2^-127, the subnormal 0x00400000.
  const __m256i tiny =
      _mm256_and_si256(_mm256_cmpeq_epi32(exponent, _mm256_setzero_si256()), _mm256_set1_epi32(0x00400000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(exponent, 23), tiny));
}

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

inline __m256 load_half_scales(WeightFormat format, const std::uint8_t* scales, int half) {
  if (format == WeightFormat::kMxfp4) return load_e8m0_scales(scales, half);
  if (format == WeightFormat::kNf4) return load_f32_scales(scales, half);
  return load_bf16_scales(scales, half);
}

// Eight nibbles of one word, each at the bottom of its lane with the rest of the word above it, and with its top bit in
// the lane's sign.
inline __m256i nibbles_low(__m256i word) {
  return _mm256_srlv_epi32(word, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
}
inline __m256i nibbles_high(__m256i word) {
  return _mm256_sllv_epi32(word, _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
}

// The sixteen rows of a block of a 4-bit format: read(word, row) gives the eight depths of a row's word.
template <WeightFormat kFormat>
class NibbleRows {
 public:
  explicit NibbleRows(const std::uint8_t* scales) {
    for (int half = 0; half < 2; ++half) {
      const __m256 scale = load_half_scales(kFormat, scales, half);
      _mm256_storeu_ps(scale_ + half * kHalfRows, scale);
      if constexpr (kIsInt4) {
        const __m256 offset = _mm256_mul_ps(scale, _mm256_set1_ps(-static_cast<float>(kInt4Offset)));
        _mm256_storeu_ps(offset_ + half * kHalfRows, offset);
      }
    }
  }

  __m256 read(const std::uint8_t* word, int row) const {
    const __m256i nibbles = _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(word)));
    const __m256i low = nibbles_low(nibbles);
    const __m256 scale = _mm256_broadcast_ss(scale_ + row);
    if constexpr (kIsInt4) {
      const __m256 code = _mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32(0xF)));
      return _mm256_fmadd_ps(code, scale, _mm256_broadcast_ss(offset_ + row));  // exact: 4 and 8 significant bits
    }
    const __m256 high = _mm256_castsi256_ps(nibbles_high(nibbles));
    if constexpr (kFormat == WeightFormat::kMxfp4) {
      // The lookup reads the low three bits of each code.
      const __m256 magnitude = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kMxfp4Values), low);
      return _mm256_mul_ps(_mm256_xor_ps(magnitude, _mm256_and_ps(high, _mm256_set1_ps(-0.0f))), scale);
    }
    const __m256 lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kNf4Values), low);
    const __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kNf4Values + 8), low);
    return _mm256_mul_ps(_mm256_blendv_ps(lower, upper, high), scale);
  }

 private:
  static constexpr bool kIsInt4 = kFormat == WeightFormat::kInt4G32 || kFormat == WeightFormat::kInt4G128;
  static_assert(bits_of(kFormat) == 4);

  float scale_[kBlockRows], offset_[kBlockRows];
};

}  // namespace
}  // namespace kt_expert
