// AVX-512 on resident weights of every format, with fp32 operands.
#include "gemm/grouped_tiles.h"
#include "gemm/x86_avx512.h"
#include "gemm/x86_avx512_decode.h"

namespace kt_expert {
namespace {

template <WeightFormat kFormat>
void expand_backward(const PackedMatrix& w, int depth_block, int first_row, int row_blocks, void* panel0,
                     void* panel1) {
  float* panels[2] = {static_cast<float*>(panel0), static_cast<float*>(panel1)};
  for_each_turned_half<kFormat>(w, depth_block, first_row, row_blocks,
                                [&](int half, const __m512(&t)[kBlockRows]) KT_LAMBDA_INLINE {
#pragma GCC unroll 16
                                  for (int n = 0; n < kBlockRows; ++n)
                                    _mm512_storeu_ps(panels[half] + n * kPanelColumns, t[n]);
                                  panels[half] += kBlockRows * kPanelColumns;
                                });
}

// One row block of W, all columns; every group of sixteen columns is an independent chain of sixteen additions.
template <WeightFormat kFormat, int kRows>
void backward_rows(const float* const* rows, const PackedMatrix& w, int row_block, const BlockRange& range, float* c,
                   std::int64_t c_stride) {
  constexpr int kAheadBlocks = 4096 / block_bytes(kFormat);  // hides memory's latency, stays in the first-level cache
  const float* a[kRows];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) a[m] = rows[m];
  const std::int64_t next_row = (std::int64_t{w.depth_blocks} - range.depth_blocks) * block_bytes(kFormat);
  for (int j = 0; j < range.depth_blocks; ++j) {
    const std::uint8_t* block = block_at<kFormat>(w, row_block, range.first_depth + j);
    const Avx512Reader<kFormat> reader(scales_at<kFormat>(w, row_block, range.first_depth + j), 0);
    const std::int64_t skipped = j + kAheadBlocks < range.depth_blocks ? 0 : next_row;
    prefetch(block + kAheadBlocks * block_bytes(kFormat) + skipped, block_bytes(kFormat));
    for (int half = 0; half < 2; ++half) {
      float* target = c + static_cast<std::int64_t>(j) * kBlockDepth + half * kPanelColumns;
      __m512 t[kBlockRows], sum[kRows];
      read_turned<kFormat>(reader, block, half, t);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) sum[m] = _mm512_loadu_ps(target + m * c_stride);
#pragma GCC unroll 16
      for (int n = 0; n < kBlockRows; ++n) {
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) sum[m] = _mm512_fmadd_ps(_mm512_set1_ps(a[m][n]), t[n], sum[m]);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) _mm512_storeu_ps(target + m * c_stride, sum[m]);
    }
  }
}

constexpr int kDirectBackwardRows = 4;  // above, turning a block for every tile of rows costs more than a panel

template <WeightFormat kFormat>
void direct_backward(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                     std::int64_t c_stride) {
  const float* row[kDirectBackwardRows];
  for (int m = 0; m < rows; ++m) row[m] = f32_row(a, m);
  for (int b = 0; b < range.row_blocks; ++b) {
    with_constant<kDirectBackwardRows>(rows, [&](auto count) {
      backward_rows<kFormat, count.value>(row, w, range.first_row + b, range, c, c_stride);
    });
    for (int m = 0; m < rows; ++m) row[m] += kBlockRows;
  }
}

template <WeightFormat kFormat>
FormatKernels kernels_of() {
  // One row tile reads bf16 as fast from blocks as from panels; decoding the others is worth doing once.
  constexpr int kDirectRows = kFormat == WeightFormat::kBf16 ? Avx512::kMaxRows : 4;
  FormatKernels kernels{};
  if constexpr (is_grouped(kFormat)) {
    set_grouped_forward<Avx512, kFormat, kDirectRows>(kernels);
  } else {
    set_plain_forward<Avx512, kFormat>(kernels, kDirectRows);
  }
  kernels.direct_backward_rows = kDirectBackwardRows;
  kernels.direct_backward = direct_backward<kFormat>;
  kernels.expand_backward = expand_backward<kFormat>;
  return kernels;
}

}  // namespace

FormatKernels avx512_format(WeightFormat format) {
  return with_format(format, [](auto constant) { return kernels_of<constant.value>(); });
}

}  // namespace kt_expert
