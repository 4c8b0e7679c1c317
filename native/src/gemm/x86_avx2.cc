// AVX2 + FMA: bf16 weights are widened to fp32 panels in cache, products run in 6 x 16 register tiles (12 of the 16
// YMM registers accumulate; the rest hold two B vectors and one broadcast of A).
#include <immintrin.h>

#include <algorithm>

#include "gemm/elementwise.h"

namespace kt_expert {
namespace {

constexpr int kRows = 6;
constexpr int kColumns = 16;
constexpr int kVector = 8;      // floats in a YMM register
constexpr int kLinesAhead = 4;  // how far ahead of its use a line is prefetched
constexpr int kMaxDepth = 384;  // one B panel of 16 columns is then 24 KiB, inside a 32 KiB L1

__m256 widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }

__m256 load_bf16(const bf16_t* source) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))); }

// Rows become columns: 8 x 8 floats in registers.
void transpose(__m256 (&r)[kVector]) {
  const __m256 t0 = _mm256_unpacklo_ps(r[0], r[1]), t1 = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 t2 = _mm256_unpacklo_ps(r[2], r[3]), t3 = _mm256_unpackhi_ps(r[2], r[3]);
  const __m256 t4 = _mm256_unpacklo_ps(r[4], r[5]), t5 = _mm256_unpackhi_ps(r[4], r[5]);
  const __m256 t6 = _mm256_unpacklo_ps(r[6], r[7]), t7 = _mm256_unpackhi_ps(r[6], r[7]);
  const __m256 u0 = _mm256_shuffle_ps(t0, t2, 0x44), u1 = _mm256_shuffle_ps(t0, t2, 0xEE);
  const __m256 u2 = _mm256_shuffle_ps(t1, t3, 0x44), u3 = _mm256_shuffle_ps(t1, t3, 0xEE);
  const __m256 u4 = _mm256_shuffle_ps(t4, t6, 0x44), u5 = _mm256_shuffle_ps(t4, t6, 0xEE);
  const __m256 u6 = _mm256_shuffle_ps(t5, t7, 0x44), u7 = _mm256_shuffle_ps(t5, t7, 0xEE);
  r[0] = _mm256_permute2f128_ps(u0, u4, 0x20);
  r[1] = _mm256_permute2f128_ps(u1, u5, 0x20);
  r[2] = _mm256_permute2f128_ps(u2, u6, 0x20);
  r[3] = _mm256_permute2f128_ps(u3, u7, 0x20);
  r[4] = _mm256_permute2f128_ps(u0, u4, 0x31);
  r[5] = _mm256_permute2f128_ps(u1, u5, 0x31);
  r[6] = _mm256_permute2f128_ps(u2, u6, 0x31);
  r[7] = _mm256_permute2f128_ps(u3, u7, 0x31);
}

__m256 load_floats(const bf16_t* source) { return load_bf16(source); }
__m256 load_floats(const float* source) { return _mm256_loadu_ps(source); }
float to_float(bf16_t value) { return bf16_to_float(value); }
float to_float(float value) { return value; }

// Rows are usually a power of two apart, so their lines share one set of the cache: a line is used up before the next
// eight rows push it out, and the lines after it are asked for early.
template <typename T>
void expand_nk(const T* source, std::int64_t stride, int columns, int depth, float* panel) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));  // elements in a cache line
  int k = 0;
  for (; columns == kColumns && k + kLine <= depth; k += kLine) {
    for (int half = 0; half < kColumns; half += kVector) {
      for (int n = 0; n < kVector; ++n) {
        _mm_prefetch(reinterpret_cast<const char*>(source + (half + n) * stride + k + kLinesAhead * kLine),
                     _MM_HINT_T0);
      }
      for (int step = k; step < k + kLine; step += kVector) {
        __m256 block[kVector];
#pragma GCC unroll 8
        for (int n = 0; n < kVector; ++n) block[n] = load_floats(source + (half + n) * stride + step);
        transpose(block);
#pragma GCC unroll 8
        for (int j = 0; j < kVector; ++j) _mm256_storeu_ps(panel + (step + j) * kColumns + half, block[j]);
      }
    }
  }
  for (; k < depth; ++k) {
    for (int n = 0; n < kColumns; ++n) {
      panel[k * kColumns + n] = n < columns ? to_float(source[n * stride + k]) : 0.0f;
    }
  }
}

void expand_kn(const bf16_t* source, std::int64_t stride, int columns, int depth, float* panel) {
  for (int k = 0; k < depth; ++k) {
    const bf16_t* row = source + k * stride;
    float* target = panel + k * kColumns;
    if (columns == kColumns) {
      _mm256_storeu_ps(target, load_bf16(row));
      _mm256_storeu_ps(target + kVector, load_bf16(row + kVector));
      continue;
    }
    for (int n = 0; n < kColumns; ++n) target[n] = n < columns ? bf16_to_float(row[n]) : 0.0f;
  }
}

void pack(const float* const* rows, int count, float scale, int depth, float* panel) {
  const __m256 factor = _mm256_set1_ps(scale);
  int k = 0;
  for (; k + kVector <= depth; k += kVector) {
    __m256 block[kVector];
#pragma GCC unroll 8
    for (int m = 0; m < kVector; ++m) {
      block[m] = m < count ? _mm256_mul_ps(factor, _mm256_loadu_ps(rows[m] + k)) : _mm256_setzero_ps();
    }
    transpose(block);
    // Ascending stores: the two floats past row k are the first two of row k + 1, written next.
#pragma GCC unroll 8
    for (int j = 0; j < kVector; ++j) _mm256_storeu_ps(panel + (k + j) * kRows, block[j]);
  }
  for (; k < depth; ++k) {
    for (int m = 0; m < kRows; ++m) panel[k * kRows + m] = m < count ? scale * rows[m][k] : 0.0f;
  }
}

// The unroll pragmas are not a hint: without them gcc 12 keeps the accumulators in memory and stores all twelve at
// every step, at half the speed.
template <int kTileRows>
void tile(int depth, const float* a_panel, const float* b_panel, float* c, std::int64_t c_stride) {
  __m256 left[kTileRows], right[kTileRows];
#pragma GCC unroll 6
  for (int m = 0; m < kTileRows; ++m) {
    left[m] = _mm256_loadu_ps(c + m * c_stride);
    right[m] = _mm256_loadu_ps(c + m * c_stride + kVector);
  }
  for (int k = 0; k < depth; ++k) {
    const __m256 b0 = _mm256_loadu_ps(b_panel + k * kColumns);
    const __m256 b1 = _mm256_loadu_ps(b_panel + k * kColumns + kVector);
#pragma GCC unroll 6
    for (int m = 0; m < kTileRows; ++m) {
      const __m256 a = _mm256_broadcast_ss(a_panel + k * kRows + m);
      left[m] = _mm256_fmadd_ps(a, b0, left[m]);
      right[m] = _mm256_fmadd_ps(a, b1, right[m]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kTileRows; ++m) {
    _mm256_storeu_ps(c + m * c_stride, left[m]);
    _mm256_storeu_ps(c + m * c_stride + kVector, right[m]);
  }
}

void tile_of(int rows, int depth, const float* a_panel, const float* b_panel, float* c, std::int64_t c_stride) {
  switch (rows) {
    case 1:
      return tile<1>(depth, a_panel, b_panel, c, c_stride);
    case 2:
      return tile<2>(depth, a_panel, b_panel, c, c_stride);
    case 3:
      return tile<3>(depth, a_panel, b_panel, c, c_stride);
    case 4:
      return tile<4>(depth, a_panel, b_panel, c, c_stride);
    case 5:
      return tile<5>(depth, a_panel, b_panel, c, c_stride);
    default:
      return tile<kRows>(depth, a_panel, b_panel, c, c_stride);
  }
}

void multiply(int depth, const float* a_panel, const float* b_panel, float* c, std::int64_t c_stride, int rows,
              int columns) {
  if (columns == kColumns) return tile_of(rows, depth, a_panel, b_panel, c, c_stride);
  float edge[kRows * kColumns] = {};
  for (int m = 0; m < rows; ++m) std::copy_n(c + m * c_stride, columns, edge + m * kColumns);
  tile_of(rows, depth, a_panel, b_panel, edge, kColumns);
  for (int m = 0; m < rows; ++m) std::copy_n(edge + m * kColumns, columns, c + m * c_stride);
}

// exp by range reduction to [-ln2/2, ln2/2] and a degree-6 Taylor polynomial: below 2 ulp over the finite range.
__m256 exp_ps(__m256 x) {
  const __m256 high = _mm256_set1_ps(88.02969f), low = _mm256_set1_ps(-87.33654f);
  x = _mm256_max_ps(_mm256_min_ps(x, high), low);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, the first with trailing zeros so that n times it is exact.
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.0f / 720.0f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  constexpr int kExponentBias = 127;
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(kExponentBias));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

__m256 sigmoid(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_div_ps(one, _mm256_add_ps(one, exp_ps(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

struct GateUp {
  __m256 gate, up, gate_passes, up_passes;
};

GateUp clamp(const ActivationSpec& spec, __m256 gate, __m256 up) {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  if (spec.kind == Activation::kSilu) return {gate, up, all, all};
  const __m256 limit = _mm256_set1_ps(spec.limit), floor = _mm256_set1_ps(-spec.limit);
  const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(up, limit, _CMP_LE_OQ), _mm256_cmp_ps(up, floor, _CMP_GE_OQ));
  // The value is the second operand: min and max return it where one is NaN, so NaN passes through as in torch.
  const __m256 clamped = _mm256_max_ps(floor, _mm256_min_ps(limit, up));
  return {_mm256_min_ps(limit, gate), _mm256_add_ps(clamped, _mm256_set1_ps(1.0f)),
          _mm256_cmp_ps(gate, limit, _CMP_LE_OQ), inside};
}

__m256 activate_vector(const ActivationSpec& spec, __m256 gate, __m256 up) {
  const GateUp in = clamp(spec, gate, up);
  const __m256 s = sigmoid(_mm256_mul_ps(_mm256_set1_ps(spec.alpha), in.gate));
  return _mm256_mul_ps(_mm256_mul_ps(in.gate, s), in.up);
}

void activate(const ActivationSpec& spec, const float* gate, const float* up, float* h, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kVector <= count; i += kVector) {
    _mm256_storeu_ps(h + i, activate_vector(spec, _mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
  }
  if (i == count) return;
  float tail[3][kVector] = {};
  std::copy_n(gate + i, count - i, tail[0]);
  std::copy_n(up + i, count - i, tail[1]);
  _mm256_storeu_ps(tail[2], activate_vector(spec, _mm256_loadu_ps(tail[0]), _mm256_loadu_ps(tail[1])));
  std::copy_n(tail[2], count - i, h + i);
}

void backward_vector(const ActivationSpec& spec, const float* gate, const float* up, const float* d_h, float* d_gate,
                     float* d_up) {
  const GateUp in = clamp(spec, _mm256_loadu_ps(gate), _mm256_loadu_ps(up));
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(spec.alpha), in.gate);
  const __m256 s = sigmoid(scaled);
  const __m256 d = _mm256_loadu_ps(d_h);
  const __m256 slope = _mm256_mul_ps(s, _mm256_fmadd_ps(scaled, _mm256_sub_ps(one, s), one));
  _mm256_storeu_ps(d_gate, _mm256_and_ps(in.gate_passes, _mm256_mul_ps(_mm256_mul_ps(d, in.up), slope)));
  _mm256_storeu_ps(d_up, _mm256_and_ps(in.up_passes, _mm256_mul_ps(_mm256_mul_ps(d, in.gate), s)));
}

void activate_backward(const ActivationSpec& spec, const float* gate, const float* up, const float* d_h, float* d_gate,
                       float* d_up, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kVector <= count; i += kVector) {
    backward_vector(spec, gate + i, up + i, d_h + i, d_gate + i, d_up + i);
  }
  if (i == count) return;
  float tail[5][kVector] = {};
  std::copy_n(gate + i, count - i, tail[0]);
  std::copy_n(up + i, count - i, tail[1]);
  std::copy_n(d_h + i, count - i, tail[2]);
  backward_vector(spec, tail[0], tail[1], tail[2], tail[3], tail[4]);
  std::copy_n(tail[3], count - i, d_gate + i);
  std::copy_n(tail[4], count - i, d_up + i);
}

}  // namespace

const KernelTable& avx2_kernels() {
  static constexpr KernelTable kTable{
      Isa::kAvx2,       "avx2_6x16",      kRows,      kColumns,        kMaxDepth, expand_nk<bf16_t>,
      expand_kn,        expand_nk<float>, pack,       multiply,        activate,  activate_backward,
      loop_bf16_to_f32, loop_f32_to_bf16, loop_scale, loop_add_scaled, loop_dot,  loop_sum_squares,
      loop_adamw};
  return kTable;
}

}  // namespace kt_expert
