// AVX-512 VNNI: int8 weights times activations quantised to int8, four products a lane with VPDPBUSD. The instruction
// takes its left operand unsigned, so 128 is added to it and 128 times each column's sum taken off again; both are
// exact. Everything else is the AVX-512 ISA.
#include <cmath>
#include <cstring>
#include <limits>

#include "gemm/x86_avx512.h"
#include "gemm/x86_avx512_decode.h"

namespace kt_expert {
namespace {

constexpr int kMaxRows = 8;
constexpr int kWordDepth = 4;  // int8 values in a word
constexpr WeightFormat kFormat = WeightFormat::kInt8;

KT_INLINE __m512i biased_word(const std::int8_t* source) {
  std::int32_t word;
  std::memcpy(&word, source, sizeof word);
  return _mm512_set1_epi32(word ^ static_cast<std::int32_t>(0x80808080u));
}

template <int kRows>
void tile(const std::int8_t* const* a, const float* scales, const std::uint8_t* panel, int depth, __m512 column_scale,
          float* c, std::int64_t c_stride) {
  __m512i sum[kRows], column = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) sum[m] = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < depth; k += kWordDepth) {
    const __m512i words = _mm512_loadu_si512(panel + k / kWordDepth * kWordRowBytes);
    column = _mm512_dpbusd_epi32(column, ones, words);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) sum[m] = _mm512_dpbusd_epi32(sum[m], biased_word(a[m] + k), words);
  }
  const __m512i bias = _mm512_slli_epi32(column, 7);  // 128 times
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[m], bias));
    const __m512 scale = _mm512_mul_ps(column_scale, _mm512_set1_ps(scales[m]));
    float* target = c + m * c_stride;
    _mm512_storeu_ps(target, _mm512_fmadd_ps(exact, scale, _mm512_loadu_ps(target)));
  }
}

void multiply(const IntegerRows& a, int rows, const PackedMatrix& w, int first_row, int row_blocks, float* c,
              std::int64_t c_stride) {
  for (int j = 0; j < row_blocks; ++j) {
    const std::uint8_t* panel = block_at<kFormat>(w, first_row + j, 0);
    const __m512 column_scale = _mm512_loadu_ps(scales_at<kFormat>(w, first_row + j, 0));
    for_each_tile(rows, kMaxRows, [&](int first, int count) {
      const std::int8_t* row[kMaxRows];
      for (int m = 0; m < count; ++m) row[m] = a.base + (first + m) * a.stride;
      with_constant<kMaxRows>(count, [&](auto height) {
        tile<height.value>(row, a.scales + first, panel, w.depth_blocks * kBlockDepth, column_scale,
                           c + first * c_stride + static_cast<std::int64_t>(j) * kBlockRows, c_stride);
      });
    });
  }
}

constexpr IntegerKernels kInteger{"avx512_vnni_8x16", quantise_row, multiply};

KernelTable make_table() {
  KernelTable table = avx512_kernels();
  table.isa = Isa::kAvx512Vnni;
  table.integer = &kInteger;
  return table;
}

}  // namespace

float quantise_row(const float* values, std::int64_t count, std::int8_t* target) {
  constexpr int kLanes = 16;
  constexpr float kMax = 127.0f;
  const auto inside = [&](std::int64_t i) {
    return count - i >= kLanes ? static_cast<__mmask16>(0xFFFF) : static_cast<__mmask16>((1u << (count - i)) - 1u);
  };
  __m512 largest = _mm512_setzero_ps();
  __mmask16 unordered = 0;  // the maximum forgets NaN
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const __m512 magnitudes = _mm512_abs_ps(_mm512_maskz_loadu_ps(inside(i), values + i));
    unordered = static_cast<__mmask16>(unordered | _mm512_cmp_ps_mask(magnitudes, magnitudes, _CMP_UNORD_Q));
    largest = _mm512_max_ps(largest, magnitudes);
  }
  const float magnitude = _mm512_reduce_max_ps(largest);
  const __m512 factor = _mm512_set1_ps(magnitude > 0.0f ? kMax / magnitude : 0.0f);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(inside(i), values + i), factor));
    _mm512_mask_cvtsepi32_storeu_epi8(target + i, inside(i), codes);
  }
  return unordered != 0 ? std::numeric_limits<float>::quiet_NaN() : magnitude / kMax;
}

const KernelTable& avx512_vnni_kernels() {
  static const KernelTable kTable = make_table();
  return kTable;
}

}  // namespace kt_expert
