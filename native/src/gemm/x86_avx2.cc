// AVX2 + FMA: products of fp32 rows and fp32 panels in 6 x 16 register tiles, sums over rows, and the loops over
// contiguous floats.
#include "gemm/x86_avx2.h"

#include <algorithm>

#include "gemm/direct_f32.h"
#include "gemm/vector_loops.h"
#include "gemm/x86_avx2_codes.h"
#include "gemm/x86_avx2_vector.h"

namespace kt_expert {
namespace {

constexpr int kVector = Avx2Vector::kLanes;
constexpr int kDirectF32Rows = 4;  // from here on a panel is used often enough

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

struct Turn {
  static KT_INLINE void load(const float* source, std::int64_t stride, __m256 (&t)[kVector]) {
#pragma GCC unroll 8
    for (int n = 0; n < kVector; ++n) t[n] = _mm256_loadu_ps(source + n * stride);
    transpose(t);
  }
};

KernelTable make_table() {
  KernelTable table{};
  table.isa = Isa::kAvx2;
  table.name = "avx2_6x16";
  table.operand = OperandType::kF32;
  table.tile_rows = Avx2::kMaxRows;
  table.tile_panels = Avx2::kTilePanels;
  table.depth_step = 1;
  table.gathers = true;
  for (WeightFormat format : all_weight_formats()) table.formats[static_cast<int>(format)] = avx2_format(format);
  table.expand_f32_nk = expand_f32_nk;
  table.expand_f32_kn = expand_kn_rows;
  table.multiply = multiply_panels<Avx2>;
  set_direct_f32<Avx2, Turn, kDirectF32Rows>(table);
  set_vector_loops<Avx2, Avx2Vector>(table);
  return table;
}

}  // namespace

const KernelTable& avx2_kernels() {
  static const KernelTable kTable = make_table();
  return kTable;
}

}  // namespace kt_expert
