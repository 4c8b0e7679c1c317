// Sixteen floats in a ZMM register, with the operations the shared templates ask for.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kt_expert {
namespace {

struct Avx512Vector {
  static constexpr int kLanes = 16;
  __m512 v;

  static Avx512Vector set(float value) { return {_mm512_set1_ps(value)}; }
  static Avx512Vector load(const float* source) { return {_mm512_loadu_ps(source)}; }
  static __mmask16 first(std::int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static Avx512Vector load_partial(const float* source, std::int64_t count) {
    return {_mm512_maskz_loadu_ps(first(count), source)};
  }
  void store(float* target) const { _mm512_storeu_ps(target, v); }
  void store_partial(float* target, std::int64_t count) const { _mm512_mask_storeu_ps(target, first(count), v); }

  friend Avx512Vector operator+(Avx512Vector a, Avx512Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Avx512Vector operator-(Avx512Vector a, Avx512Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Avx512Vector operator*(Avx512Vector a, Avx512Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Avx512Vector operator/(Avx512Vector a, Avx512Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
  // a * b + c and c - a * b with one rounding.
  static Avx512Vector fma(Avx512Vector a, Avx512Vector b, Avx512Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Avx512Vector fnma(Avx512Vector a, Avx512Vector b, Avx512Vector c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  // Where one operand is NaN, the second is returned.
  static Avx512Vector min(Avx512Vector a, Avx512Vector b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Avx512Vector max(Avx512Vector a, Avx512Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Avx512Vector round(Avx512Vector a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  // 2^n for an integral n whose result is a normal number.
  static Avx512Vector power_of_two(Avx512Vector n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }
  // value where low <= x <= high, 0 elsewhere and for NaN.
  static Avx512Vector keep_within(Avx512Vector low, Avx512Vector x, Avx512Vector high, Avx512Vector value) {
    const __mmask16 inside =
        _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x.v, low.v, _CMP_GE_OQ), x.v, high.v, _CMP_LE_OQ);
    return {_mm512_maskz_mov_ps(inside, value.v)};
  }
};

}  // namespace
}  // namespace kt_expert
