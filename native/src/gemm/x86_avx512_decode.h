// Reading blocks of every weight format into ZMM registers: sixteen rows at one depth, as fp32.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "gemm/tile_loops.h"
#include "kt_expert/packed_matrix.h"
#include "weights/codes.h"

namespace kt_expert {
namespace {

// Unscaled values of a grouped format, as grouped_tiles.h asks for them: signed as they are, for every one costs the
// same.
struct PlainCodes {
  using Unpacked = __m512i;
  static constexpr float kOffset = 0.0f;
  static constexpr int kShift[8] = {};
  static Unpacked unpack(__m512i words) { return words; }
};

template <WeightFormat kFormat>
struct Avx512Codes;

template <>
struct Avx512Codes<WeightFormat::kInt8> : PlainCodes {
  static constexpr int kShift[4] = {};
  template <int kDepth>
  static __m512 read(__m512i words) {
    if constexpr (kDepth < 3) words = _mm512_slli_epi32(words, 24 - 8 * kDepth);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 24));
  }
  static __m512 scales(const std::uint8_t* stored, int) { return _mm512_loadu_ps(stored); }
};

// 4-bit codes are looked up in one register of sixteen values; the lookup reads the low four bits.
template <int kDepth>
KT_INLINE __m512 nibble_values(__m512i words, const float (&values)[16]) {
  if constexpr (kDepth > 0) words = _mm512_srli_epi32(words, 4 * kDepth);
  return _mm512_permutexvar_ps(words, _mm512_loadu_ps(values));
}

constexpr float kInt4Values[16] = {-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f,
                                   0.0f,  1.0f,  2.0f,  3.0f,  4.0f,  5.0f,  6.0f,  7.0f};
static_assert(kInt4Values[kInt4Offset] == 0.0f, "codes are stored with the offset on top");

struct Avx512Int4Codes : PlainCodes {
  template <int kDepth>
  static __m512 read(__m512i words) {
    return nibble_values<kDepth>(words, kInt4Values);
  }
  static __m512 scales(const std::uint8_t* stored, int) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};
template <>
struct Avx512Codes<WeightFormat::kInt4G32> : Avx512Int4Codes {};
template <>
struct Avx512Codes<WeightFormat::kInt4G128> : Avx512Int4Codes {};

template <>
struct Avx512Codes<WeightFormat::kMxfp4> : PlainCodes {
  template <int kDepth>
  static __m512 read(__m512i words) {
    return nibble_values<kDepth>(words, kMxfp4Values);
  }
  static __m512 scales(const std::uint8_t* stored, int) {
    const __m512i exponent = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(stored)));
    // An exponent of 0 means 2^-127, the subnormal 0x00400000.
    const __mmask16 tiny = _mm512_cmpeq_epi32_mask(exponent, _mm512_setzero_si512());
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(_mm512_slli_epi32(exponent, 23), tiny, _mm512_set1_epi32(0x00400000)));
  }
};

template <>
struct Avx512Codes<WeightFormat::kNf4> : PlainCodes {
  template <int kDepth>
  static __m512 read(__m512i words) {
    return nibble_values<kDepth>(words, kNf4Values);
  }
  static __m512 scales(const std::uint8_t* stored, int) { return _mm512_loadu_ps(stored); }
};

template <WeightFormat kFormat>
struct Avx512Reader {
  __m512 scale;
  Avx512Reader() = default;
  Avx512Reader(const std::uint8_t* scales, int part) : scale(Avx512Codes<kFormat>::scales(scales, part)) {}
  template <int kDepth>
  __m512 read(__m512i words) const {
    return _mm512_mul_ps(Avx512Codes<kFormat>::template read<kDepth>(words), scale);
  }
};

template <>
struct Avx512Reader<WeightFormat::kBf16> {
  Avx512Reader() = default;
  Avx512Reader(const std::uint8_t*, int) {}
  template <int kDepth>
  __m512 read(__m512i words) const {
    if constexpr (kDepth == 0) return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
};

template <>
struct Avx512Reader<WeightFormat::kFp8> {
  __m512 scale;
  // The code's exponent and mantissa, moved to the top of an fp32 with bias 127 instead of 7.
  static constexpr float kRebias = 1.329227995784916e36f;  // 2^120
  Avx512Reader() = default;
  Avx512Reader(const std::uint8_t* scales, int)
      : scale(_mm512_set1_ps(*reinterpret_cast<const float*>(scales) * kRebias)) {}
  template <int kDepth>
  __m512 read(__m512i words) const {
    __m512i value = words;
    if constexpr (kDepth < 3) value = _mm512_slli_epi32(value, 24 - 8 * kDepth);
    // Sign to bit 31, exponent and mantissa to bits 26..20.
    value = _mm512_and_si512(_mm512_srai_epi32(value, 4), _mm512_set1_epi32(static_cast<int>(0x87F00000u)));
    return _mm512_mul_ps(_mm512_castsi512_ps(value), scale);
  }
};

// The vector set of tile_loops.h. 8 x 48 tiles: 24 of the 32 ZMM registers accumulate.
struct Avx512 {
  using Vec = __m512;
  using Words = __m512i;
  template <WeightFormat kFormat>
  using Reader = Avx512Reader<kFormat>;
  template <WeightFormat kFormat>
  using Codes = Avx512Codes<kFormat>;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 8;
  static constexpr int kTilePanels = 3;
  static constexpr int kOneRowPanels = 4;

  static Vec load(const float* source) { return _mm512_loadu_ps(source); }
  static void store(float* target, Vec value) { _mm512_storeu_ps(target, value); }
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec multiply(Vec value, float factor) { return _mm512_mul_ps(value, _mm512_set1_ps(factor)); }
  static Vec broadcast(const float* source) { return _mm512_set1_ps(*source); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Words load_words(const std::uint8_t* source) { return _mm512_loadu_si512(source); }
};

// Rows become columns: 16 x 16 words in registers.
KT_INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16], u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  // u[4 q + j] holds, in its four 128-bit lanes L, rows 4 q .. 4 q + 3 of column 4 L + j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), high = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xDD);
    const __m512 low2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xDD);
    r[j] = _mm512_shuffle_f32x4(low, low2, 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(low, low2, 0xDD);
    r[4 + j] = _mm512_shuffle_f32x4(high, high2, 0x88);
    r[12 + j] = _mm512_shuffle_f32x4(high, high2, 0xDD);
  }
}

// Sixteen depths of the sixteen rows of a block, from depth 16 * half on: t[n] holds the depths of row n.
template <WeightFormat kFormat>
KT_INLINE void read_turned(const Avx512Reader<kFormat>& reader, const std::uint8_t* block, int half, __m512 (&t)[16]) {
  constexpr int kPerWord = values_per_word(kFormat);
  const std::uint8_t* words = block + half * block_bytes(kFormat) / 2;
  unroll<16 / kPerWord>([&](auto step) KT_LAMBDA_INLINE {
    const __m512i loaded = _mm512_loadu_si512(words + step.value * kWordRowBytes);
    unroll<kPerWord>(
        [&](auto i) KT_LAMBDA_INLINE { t[step.value * kPerWord + i.value] = reader.template read<i.value>(loaded); });
  });
  transpose(t);
}

// The blocks of one column of blocks, turned: calls body(half, t) for both halves of each.
template <WeightFormat kFormat, typename Body>
KT_INLINE void for_each_turned_half(const PackedMatrix& w, int depth_block, int first_row, int row_blocks,
                                    const Body& body) {
  constexpr int kAheadRows = 4;  // row blocks, a stride apart that no prefetcher follows
  for (int b = 0; b < row_blocks; ++b) {
    const std::uint8_t* block = block_at<kFormat>(w, first_row + b, depth_block);
    const Avx512Reader<kFormat> reader(scales_at<kFormat>(w, first_row + b, depth_block), 0);
    prefetch(block_at<kFormat>(w, first_row + b + kAheadRows, depth_block), block_bytes(kFormat));
    for (int half = 0; half < 2; ++half) {
      __m512 t[kBlockRows];
      read_turned<kFormat>(reader, block, half, t);
      body(half, t);
    }
  }
}

// Up to sixteen values of each of up to sixteen fp32 rows, turned, zero elsewhere: t[k] holds place k of every row.
KT_INLINE void load_turned(const float* source, std::int64_t stride, int rows, int count, __m512 (&t)[16]) {
  const __mmask16 inside = static_cast<__mmask16>((1u << count) - 1u);
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) {
    t[n] = n < rows ? _mm512_maskz_loadu_ps(inside, source + n * stride) : _mm512_setzero_ps();
  }
  transpose(t);
}

}  // namespace
}  // namespace kt_expert
