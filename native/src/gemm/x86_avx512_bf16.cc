// AVX-512 BF16: rows and panels of bf16 pairs, two products a lane with VDPBF16PS, in 8 x 48 register tiles. The blocks
// of bf16 weights are such panels already, so the forward multiplies them where they lie.
#include <cstring>

#include "gemm/x86_avx512.h"
#include "gemm/x86_avx512_decode.h"

namespace kt_expert {
namespace {

constexpr int kMaxRows = 8;
constexpr int kPanels = 3;

const bf16_t* row_of(const LeftRows& a, std::int64_t row) {
  return static_cast<const bf16_t*>(a.base) + (a.rows == nullptr ? row : a.rows[row]) * a.stride;
}

KT_INLINE __m512bh broadcast_pair(const bf16_t* source) {
  std::int32_t pair;
  std::memcpy(&pair, source, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

template <int kRows, int kWidth>
void tile(const bf16_t* const* a, int depth, const std::uint8_t* panels, std::int64_t panel_stride, float* c,
          std::int64_t c_stride) {
  __m512 sum[kWidth][kRows];
  const bf16_t* row[kRows];
  const std::uint8_t* panel[kWidth];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) row[m] = a[m];
#pragma GCC unroll 4
  for (int p = 0; p < kWidth; ++p) {
    panel[p] = panels + p * panel_stride;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) sum[p][m] = _mm512_loadu_ps(c + m * c_stride + p * kPanelColumns);
  }
  for (std::int64_t k = 0; k < depth; k += kPairDepth) {
    __m512bh right[kWidth];
#pragma GCC unroll 4
    for (int p = 0; p < kWidth; ++p) {
      right[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel[p] + k / kPairDepth * kWordRowBytes));
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const __m512bh left = broadcast_pair(row[m] + k);
#pragma GCC unroll 4
      for (int p = 0; p < kWidth; ++p) sum[p][m] = _mm512_dpbf16_ps(sum[p][m], left, right[p]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kWidth; ++p) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) _mm512_storeu_ps(c + m * c_stride + p * kPanelColumns, sum[p][m]);
  }
}

void multiply(const LeftRows& a, int rows, int depth, const void* panels, std::int64_t panel_stride, int panel_count,
              float* c, std::int64_t c_stride) {
  for_each_tile(rows, kMaxRows, [&](int first, int count) {
    const bf16_t* row[kMaxRows];
    for (int m = 0; m < count; ++m) row[m] = row_of(a, first + m);
    with_constant<kMaxRows>(count, [&](auto height) {
      with_constant<kPanels>(panel_count, [&](auto width) {
        tile<height.value, width.value>(row, depth, static_cast<const std::uint8_t*>(panels), panel_stride,
                                        c + first * c_stride, c_stride);
      });
    });
  });
}

void multiply_blocks(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                     std::int64_t c_stride) {
  constexpr WeightFormat kFormat = WeightFormat::kBf16;
  const std::int64_t stride = std::int64_t{w.depth_blocks} * block_bytes(kFormat);
  for (int j = 0; j < range.row_blocks; j += kPanels) {
    multiply(a, rows, range.depth_blocks * kBlockDepth, block_at<kFormat>(w, range.first_row + j, range.first_depth),
             stride, std::min(kPanels, range.row_blocks - j), c + static_cast<std::int64_t>(j) * kBlockRows, c_stride);
  }
}

double burn(std::int64_t rounds) {
  constexpr int kChains = 12, kFlopEach = 2 * 2 * 16;
  __m512 sum[kChains];
  const __m512bh values = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3F00));
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_ps();
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], values, values);
  }
  float lanes[16];
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  _mm512_storeu_ps(lanes, sum[0]);
  asm volatile("" : : "r"(lanes) : "memory");  // the sums are needed
  return static_cast<double>(kChains * kFlopEach) * static_cast<double>(rounds);
}

KernelTable make_table() {
  KernelTable table{};
  table.isa = Isa::kAvx512Bf16;
  table.name = "avx512_bf16_8x48";
  table.operand = OperandType::kBf16;
  table.tile_rows = kMaxRows;
  table.tile_panels = kPanels;
  table.depth_step = kPairDepth;
  table.gathers = true;
  set_pair_formats(table, multiply_blocks);
  table.expand_f32_nk = expand_pairs_nk;
  table.expand_f32_kn = expand_pairs_kn;
  table.multiply = multiply;
  set_avx512_loops(table);
  table.burn = burn;
  return table;
}

}  // namespace

const KernelTable& avx512_bf16_kernels() {
  static const KernelTable kTable = make_table();
  return kTable;
}

}  // namespace kt_expert
