// Codes of the grouped formats in YMM registers, as grouped_tiles.h asks for them: eight rows at one depth. Unsigned
// codes need a mask, a conversion and no shift: that is all the time memory leaves at one row.
#pragma once

#include "gemm/x86_avx2_decode.h"

namespace kt_expert {
namespace {

// The kByte-th byte of every word, 2^(8 kByte) times as large but for the top one, which would be signed.
constexpr int kByteShift[4] = {0, 8, 16, 0};
template <int kByte>
__m256 unsigned_byte(__m256i words) {
  if constexpr (kByte == 3) return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 24));
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xFF << (8 * kByte))));
}

template <WeightFormat kFormat>
struct Avx2Codes;

template <>
struct Avx2Codes<WeightFormat::kInt8> {
  using Unpacked = __m256i;
  static constexpr float kOffset = 128.0f;
  static constexpr int kShift[4] = {kByteShift[0], kByteShift[1], kByteShift[2], kByteShift[3]};
  static Unpacked unpack(__m256i words) {
    return _mm256_xor_si256(words, _mm256_set1_epi32(static_cast<int>(0x80808080u)));
  }
  template <int kDepth>
  static __m256 read(Unpacked bytes) {
    return unsigned_byte<kDepth>(bytes);
  }
  static __m256 scales(const std::uint8_t* stored, int half) { return load_f32_scales(stored, half); }
};

struct Avx2Int4Codes {
  using Unpacked = __m256i;
  static constexpr float kOffset = kInt4Offset;
  static constexpr int kShift[8] = {0, 4, 8, 12, 16, 20, 24, 0};
  static Unpacked unpack(__m256i words) { return words; }
  template <int kDepth>
  static __m256 read(Unpacked words) {
    if constexpr (kDepth == 7) return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 28));
    return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xF << (4 * kDepth))));
  }
  static __m256 scales(const std::uint8_t* stored, int half) { return load_bf16_scales(stored, half); }
};
template <>
struct Avx2Codes<WeightFormat::kInt4G32> : Avx2Int4Codes {};
template <>
struct Avx2Codes<WeightFormat::kInt4G128> : Avx2Int4Codes {};

// E2M1 values are halves of integers in [-12, 12]: looked up as bytes, eight words' nibbles at a time.
template <>
struct Avx2Codes<WeightFormat::kMxfp4> {
  struct Unpacked {
    __m256i even, odd;
  };
  static constexpr float kOffset = 12.0f;
  static constexpr int kShift[8] = {kByteShift[0], kByteShift[0], kByteShift[1], kByteShift[1],
                                    kByteShift[2], kByteShift[2], kByteShift[3], kByteShift[3]};
  static Unpacked unpack(__m256i words) {
    const __m256i twice =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i values = _mm256_add_epi8(twice, _mm256_set1_epi8(static_cast<char>(kOffset)));
    const __m256i nibble = _mm256_set1_epi8(0xF);
    return {_mm256_shuffle_epi8(values, _mm256_and_si256(words, nibble)),
            _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi32(words, 4), nibble))};
  }
  template <int kDepth>
  static __m256 read(const Unpacked& bytes) {
    return unsigned_byte<kDepth / 2>(kDepth % 2 == 0 ? bytes.even : bytes.odd);
  }
  static __m256 scales(const std::uint8_t* stored, int half) {
    return _mm256_mul_ps(load_e8m0_scales(stored, half), _mm256_set1_ps(0.5f));
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
struct Avx2Codes<WeightFormat::kNf4> {
  using Unpacked = __m256i;
  static constexpr float kOffset = 0.0f;
  static constexpr int kShift[8] = {};
  static Unpacked unpack(__m256i words) { return words; }
  template <int kDepth>
  static __m256 read(Unpacked words) {
    return nf4_values<kDepth>(words);
  }
  static __m256 scales(const std::uint8_t* stored, int half) { return load_f32_scales(stored, half); }
};

// The vector set of tile_loops.h. 6 x 16 tiles: 12 of the 16 YMM registers accumulate.
struct Avx2 {
  using Vec = __m256;
  using Words = __m256i;
  template <WeightFormat kFormat>
  using Reader = kt_expert::Reader<kFormat>;
  template <WeightFormat kFormat>
  using Codes = Avx2Codes<kFormat>;
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 6;
  static constexpr int kTilePanels = 1;
  static constexpr int kOneRowPanels = 2;

  static Vec load(const float* source) { return _mm256_loadu_ps(source); }
  static Vec zero() { return _mm256_setzero_ps(); }
  static void store(float* target, Vec value) { _mm256_storeu_ps(target, value); }
  static Vec broadcast(const float* source) { return _mm256_broadcast_ss(source); }
  static Vec multiply(Vec value, float factor) { return _mm256_mul_ps(value, _mm256_set1_ps(factor)); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Words load_words(const std::uint8_t* source) { return kt_expert::load_words(source); }
};

}  // namespace
}  // namespace kt_expert
