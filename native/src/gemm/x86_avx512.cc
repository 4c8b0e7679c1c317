// AVX-512 (F, BW, VL, DQ): products of fp32 rows and fp32 panels in 8 x 48 register tiles, sums over rows, and the
// loops over contiguous floats.
#include "gemm/x86_avx512.h"

#include "gemm/direct_f32.h"
#include "gemm/vector_loops.h"
#include "gemm/x86_avx512_decode.h"
#include "gemm/x86_avx512_vector.h"

namespace kt_expert {
namespace {

constexpr int kDirectF32Rows = 4;  // as with AVX2

void expand_f32_nk(const float* source, std::int64_t stride, int columns, int depth, void* target) {
  constexpr int kLanes = Avx512Vector::kLanes;
  float* panel = static_cast<float*>(target);
  for (int k = 0; k < depth; k += kLanes) {
    const int count = std::min(kLanes, depth - k);
    __m512 block[kPanelColumns];
    load_turned(source + k, stride, columns, count, block);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      if (j < count) _mm512_storeu_ps(panel + (k + j) * kPanelColumns, block[j]);
    }
  }
}

struct Turn {
  static KT_INLINE void load(const float* source, std::int64_t stride, __m512 (&t)[kPanelColumns]) {
    load_turned(source, stride, kPanelColumns, kPanelColumns, t);
  }
};

KernelTable make_table() {
  KernelTable table{};
  table.isa = Isa::kAvx512;
  table.name = "avx512_8x48";
  table.operand = OperandType::kF32;
  table.tile_rows = Avx512::kMaxRows;
  table.tile_panels = Avx512::kTilePanels;
  table.depth_step = 1;
  table.gathers = true;
  for (WeightFormat format : all_weight_formats()) table.formats[static_cast<int>(format)] = avx512_format(format);
  table.expand_f32_nk = expand_f32_nk;
  table.expand_f32_kn = expand_kn_rows;
  table.multiply = multiply_panels<Avx512>;
  set_direct_f32<Avx512, Turn, kDirectF32Rows>(table);
  set_avx512_loops(table);
  return table;
}

}  // namespace

void set_avx512_loops(KernelTable& table) { set_vector_loops<Avx512, Avx512Vector>(table); }

const KernelTable& avx512_kernels() {
  static const KernelTable kTable = make_table();
  return kTable;
}

}  // namespace kt_expert
