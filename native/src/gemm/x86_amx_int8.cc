// AMX INT8: int8 weights times activations quantised to int8 in tiles, 16 x 16 outputs and 64 depths an instruction.
// Everything else is the AMX BF16 ISA.
#include <immintrin.h>

#include <algorithm>

#include "gemm/x86_amx.h"
#include "gemm/x86_avx512.h"

namespace kt_expert {
namespace {

constexpr WeightFormat kFormat = WeightFormat::kInt8;
constexpr int kIntegerDepth = 64;
constexpr int kStripRows = 64;  // rows whose exact sums wait for their scales: 64 x 64 x 4 bytes, in the L1 cache
constexpr int kStripColumns = kTilePanels * kTileRows;

// c += exact * row scale * column scale
void add_scaled_sums(const std::int32_t* exact, const float* row_scales, int rows, const PackedMatrix& w, int first_row,
                     int panels, float* c, std::int64_t c_stride) {
  for (int p = 0; p < panels; ++p) {
    const __m512 column_scales = _mm512_loadu_ps(scales_at<kFormat>(w, first_row + p, 0));
    for (int m = 0; m < rows; ++m) {
      const __m512 sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(exact + m * kStripColumns + p * kTileRows));
      const __m512 scale = _mm512_mul_ps(column_scales, _mm512_set1_ps(row_scales[m]));
      float* target = c + m * c_stride + p * kTileRows;
      _mm512_storeu_ps(target, _mm512_fmadd_ps(sums, scale, _mm512_loadu_ps(target)));
    }
  }
}

void multiply(const IntegerRows& a, int rows, const PackedMatrix& w, int first_row, int row_blocks, float* c,
              std::int64_t c_stride) {
  HardwareTiles<true> tiles;
  alignas(64) std::int32_t exact[kStripRows * kStripColumns];
  const std::int64_t stride = std::int64_t{w.depth_blocks} * block_bytes(kFormat);
  // An odd block at the end is multiplied together with whatever follows it: A is zero there.
  const int depth = (w.depth_blocks * kBlockDepth + kIntegerDepth - 1) / kIntegerDepth;
  for (int j = 0; j < row_blocks; j += kTilePanels) {
    const int panels = std::min(kTilePanels, row_blocks - j);
    const std::uint8_t* first = block_at<kFormat>(w, first_row + j, 0);
    for (int m = 0; m < rows; m += kStripRows) {
      const int strip = std::min(kStripRows, rows - m);
      const TileOperands in{reinterpret_cast<const std::uint8_t*>(a.base + m * a.stride), a.stride, first, stride,
                            depth};
      multiply_tiles<true>(tiles, in, strip, panels, reinterpret_cast<std::uint8_t*>(exact),
                           kStripColumns * static_cast<std::int64_t>(sizeof(std::int32_t)));
      add_scaled_sums(exact, a.scales + m, strip, w, first_row + j, panels,
                      c + m * c_stride + static_cast<std::int64_t>(j) * kBlockRows, c_stride);
    }
  }
}

constexpr IntegerKernels kInteger{"amx_int8_32x32", quantise_row, multiply};

KernelTable make_table() {
  KernelTable table = amx_bf16_kernels();
  table.isa = Isa::kAmxInt8;
  table.integer = &kInteger;
  return table;
}

}  // namespace

const KernelTable& amx_int8_kernels() {
  static const KernelTable kTable = make_table();
  return kTable;
}

}  // namespace kt_expert
