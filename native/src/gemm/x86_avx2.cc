// AVX2 + FMA: products of fp32 rows and fp32 panels in 6 x 16 register tiles, sums over rows, and the loops over
// contiguous floats.
#include "gemm/x86_avx2.h"

#include <algorithm>

#include "gemm/activation_loops.h"
#include "gemm/elementwise.h"
#include "gemm/tiles.h"
#include "gemm/x86_avx2_vector.h"

namespace kt_expert {
namespace {

constexpr int kVector = Avx2Vector::kLanes;

void expand_f32_nk(const float* source, std::int64_t stride, int columns, int depth, void* target) {
  float* panel = static_cast<float*>(target);
  int k = 0;
  for (; columns == kPanelColumns && k + kVector <= depth; k += kVector) {
    for (int half = 0; half < kPanelColumns; half += kVector) {
      __m256 block[kVector];
#pragma GCC unroll 8
      for (int n = 0; n < kVector; ++n) block[n] = _mm256_loadu_ps(source + (half + n) * stride + k);
      transpose(block);
#pragma GCC unroll 8
      for (int j = 0; j < kVector; ++j) _mm256_storeu_ps(panel + (k + j) * kPanelColumns + half, block[j]);
    }
  }
  for (; k < depth; ++k) {
    for (int n = 0; n < kPanelColumns; ++n) {
      panel[k * kPanelColumns + n] = n < columns ? source[n * stride + k] : 0.0f;
    }
  }
}

void expand_f32_kn(const float* source, std::int64_t stride, int columns, int depth, void* target) {
  float* panel = static_cast<float*>(target);
  for (int k = 0; k < depth; ++k, panel += kPanelColumns) {
    std::copy_n(source + k * stride, columns, panel);
    std::fill(panel + columns, panel + kPanelColumns, 0.0f);
  }
}

// The unroll pragmas are not a hint: without them gcc 12 keeps the accumulators in memory and stores all twelve at
// every step, at half the speed.
template <int kRows>
void tile(const float* const* a, int depth, const float* panel, float* c, std::int64_t c_stride) {
  __m256 left[kRows], right[kRows];
  const float* row[kRows];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
    row[m] = a[m];
    left[m] = _mm256_loadu_ps(c + m * c_stride);
    right[m] = _mm256_loadu_ps(c + m * c_stride + kVector);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const __m256 b0 = _mm256_loadu_ps(panel + k * kPanelColumns);
    const __m256 b1 = _mm256_loadu_ps(panel + k * kPanelColumns + kVector);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const __m256 value = _mm256_broadcast_ss(row[m] + k);
      left[m] = _mm256_fmadd_ps(value, b0, left[m]);
      right[m] = _mm256_fmadd_ps(value, b1, right[m]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
    _mm256_storeu_ps(c + m * c_stride, left[m]);
    _mm256_storeu_ps(c + m * c_stride + kVector, right[m]);
  }
}

void tile_of(int rows, const float* const* a, int depth, const float* panel, float* c, std::int64_t c_stride) {
  switch (rows) {
    case 1:
      return tile<1>(a, depth, panel, c, c_stride);
    case 2:
      return tile<2>(a, depth, panel, c, c_stride);
    case 3:
      return tile<3>(a, depth, panel, c, c_stride);
    case 4:
      return tile<4>(a, depth, panel, c, c_stride);
    case 5:
      return tile<5>(a, depth, panel, c, c_stride);
    default:
      return tile<kAvx2Rows>(a, depth, panel, c, c_stride);
  }
}

void multiply(const LeftRows& a, int rows, int depth, const void* panels, std::int64_t panel_stride, int panel_count,
              float* c, std::int64_t c_stride) {
  for (int p = 0; p < panel_count; ++p) {
    const float* panel = reinterpret_cast<const float*>(static_cast<const char*>(panels) + p * panel_stride);
    for_each_tile(rows, kAvx2Rows, [&](int first, int count) {
      const float* row[kAvx2Rows];
      for (int m = 0; m < count; ++m) row[m] = row_pointer(a, first + m);
      tile_of(count, row, depth, panel, c + first * c_stride + static_cast<std::int64_t>(p) * kPanelColumns, c_stride);
    });
  }
}

// kRows x 16 elements of the sum; the rows of `left` are read along m, so nothing is packed.
template <int kRows>
void outer_tile(const OuterRows& left, const OuterRows& right, int depth, std::int64_t m0, std::int64_t n0, float* c,
                std::int64_t c_stride) {
  __m256 low[kRows], high[kRows];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
    low[m] = _mm256_loadu_ps(c + m * c_stride);
    high[m] = _mm256_loadu_ps(c + m * c_stride + kVector);
  }
  for (int k = 0; k < depth; ++k) {
    const float* values = left.row(k) + m0;
    const float* line = right.row(k) + n0;
    const __m256 b0 = _mm256_loadu_ps(line), b1 = _mm256_loadu_ps(line + kVector);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const __m256 value = _mm256_broadcast_ss(values + m);
      low[m] = _mm256_fmadd_ps(value, b0, low[m]);
      high[m] = _mm256_fmadd_ps(value, b1, high[m]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
    _mm256_storeu_ps(c + m * c_stride, low[m]);
    _mm256_storeu_ps(c + m * c_stride + kVector, high[m]);
  }
}

void outer_edge(const OuterRows& left, const OuterRows& right, int depth, std::int64_t m0, int rows, std::int64_t n0,
                int columns, float* c, std::int64_t c_stride) {
  for (int k = 0; k < depth; ++k) {
    for (int m = 0; m < rows; ++m) {
      const float value = left.row(k)[m0 + m];
      const float* line = right.row(k) + n0;
      for (int n = 0; n < columns; ++n) c[m * c_stride + n] = std::fma(value, line[n], c[m * c_stride + n]);
    }
  }
}

void outer(const OuterRows& left, const OuterRows& right, int depth, int rows, int columns, float* c,
           std::int64_t c_stride) {
  int n0 = 0;
  for (; n0 + kPanelColumns <= columns; n0 += kPanelColumns) {
    for_each_tile(rows, kAvx2Rows, [&](int m0, int count) {
      float* target = c + m0 * c_stride + n0;
      switch (count) {
        case 1:
          return outer_tile<1>(left, right, depth, m0, n0, target, c_stride);
        case 2:
          return outer_tile<2>(left, right, depth, m0, n0, target, c_stride);
        case 3:
          return outer_tile<3>(left, right, depth, m0, n0, target, c_stride);
        case 4:
          return outer_tile<4>(left, right, depth, m0, n0, target, c_stride);
        case 5:
          return outer_tile<5>(left, right, depth, m0, n0, target, c_stride);
        default:
          return outer_tile<kAvx2Rows>(left, right, depth, m0, n0, target, c_stride);
      }
    });
  }
  if (n0 < columns) outer_edge(left, right, depth, 0, rows, n0, columns - n0, c + n0, c_stride);
}

KernelTable make_table() {
  KernelTable table{};
  table.isa = Isa::kAvx2;
  table.name = "avx2_6x16";
  table.operand = OperandType::kF32;
  table.tile_rows = kAvx2Rows;
  table.tile_panels = 1;
  table.depth_step = 1;
  table.gathers = true;
  for (WeightFormat format : all_weight_formats()) table.formats[static_cast<int>(format)] = avx2_format(format);
  table.expand_f32_nk = expand_f32_nk;
  table.expand_f32_kn = expand_f32_kn;
  table.multiply = multiply;
  table.outer = outer;
  table.activate = loop_activate<Avx2Vector>;
  table.activate_backward = loop_activate_backward<Avx2Vector>;
  table.bf16_to_f32 = loop_bf16_to_f32;
  table.f32_to_bf16 = loop_f32_to_bf16;
  table.scale = loop_scale;
  table.add_scaled = loop_add_scaled;
  table.dot = loop_dot;
  table.sum_squares = loop_sum_squares;
  table.adamw = loop_adamw;
  return table;
}

}  // namespace

const KernelTable& avx2_kernels() {
  static const KernelTable kTable = make_table();
  return kTable;
}

}  // namespace kt_expert
