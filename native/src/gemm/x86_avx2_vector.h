// Eight floats in a YMM register, with the operations the shared templates ask for.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace kt_expert {
namespace {

struct Avx2Vector {
  static constexpr int kLanes = 8;
  __m256 v;

  static Avx2Vector set(float value) { return {_mm256_set1_ps(value)}; }
  static Avx2Vector load(const float* source) { return {_mm256_loadu_ps(source)}; }
  static Avx2Vector load_partial(const float* source, std::int64_t count) {
    float lanes[kLanes] = {};
    std::copy_n(source, count, lanes);
    return load(lanes);
  }
  void store(float* target) const { _mm256_storeu_ps(target, v); }
  void store_partial(float* target, std::int64_t count) const {
    float lanes[kLanes];
    store(lanes);
    std::copy_n(lanes, count, target);
  }

  friend Avx2Vector operator+(Avx2Vector a, Avx2Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Avx2Vector operator-(Avx2Vector a, Avx2Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Avx2Vector operator*(Avx2Vector a, Avx2Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Avx2Vector operator/(Avx2Vector a, Avx2Vector b) { return {_mm256_div_ps(a.v, b.v)}; }
  // a * b + c and c - a * b with one rounding.
  static Avx2Vector fma(Avx2Vector a, Avx2Vector b, Avx2Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Avx2Vector fnma(Avx2Vector a, Avx2Vector b, Avx2Vector c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  // Where one operand is NaN, the second is returned.
  static Avx2Vector min(Avx2Vector a, Avx2Vector b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Avx2Vector max(Avx2Vector a, Avx2Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Avx2Vector round(Avx2Vector a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  // 2^n for an integral n whose result is a normal number.
  static Avx2Vector power_of_two(Avx2Vector n) {
    constexpr int kExponentBias = 127, kMantissaBits = 23;
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(kExponentBias));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, kMantissaBits))};
  }
  // value where low <= x <= high, 0 elsewhere and for NaN.
  static Avx2Vector keep_within(Avx2Vector low, Avx2Vector x, Avx2Vector high, Avx2Vector value) {
    const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(x.v, low.v, _CMP_GE_OQ), _mm256_cmp_ps(x.v, high.v, _CMP_LE_OQ));
    return {_mm256_and_ps(inside, value.v)};
  }
};

}  // namespace
}  // namespace kt_expert
