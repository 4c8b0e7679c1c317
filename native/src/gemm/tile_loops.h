// Register tiles, once for every vector width. I is an ISA's vector set: Vec (fp32 lanes), Words (32-bit words),
// kLanes, kMaxRows, load, store, broadcast, fma, load_words, and Reader<format>(scales, part) with read<depth>(words).
//
// Accumulators are arrays indexed by constants only, and every loop over them is unrolled by pragma: gcc 12 otherwise
// keeps them in memory and stores all of them at every step, at half the speed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "gemm/kernels.h"
#include "gemm/tiles.h"

namespace kt_expert {
namespace {

#define KT_INLINE __attribute__((always_inline)) inline
#define KT_LAMBDA_INLINE __attribute__((always_inline))

// Calls body(integral constant) for 0 .. kCount - 1: indices that must be known when the code is compiled.
template <int kCount, int kIndex = 0, typename Body>
KT_INLINE void unroll(const Body& body) {
  if constexpr (kIndex < kCount) {
    body(std::integral_constant<int, kIndex>{});
    unroll<kCount, kIndex + 1>(body);
  }
}

// Calls body(integral constant equal to count), for a count in [1, kMax].
template <int kMax, typename Body>
KT_INLINE void with_constant(int count, const Body& body) {
  if constexpr (kMax > 1) {
    if (count < kMax) return with_constant<kMax - 1>(count, body);
  }
  body(std::integral_constant<int, kMax>{});
}

// Calls body(integral constant of the format).
template <typename Body>
auto with_format(WeightFormat format, const Body& body) {
  switch (format) {
    case WeightFormat::kBf16:
      return body(std::integral_constant<WeightFormat, WeightFormat::kBf16>{});
    case WeightFormat::kInt8:
      return body(std::integral_constant<WeightFormat, WeightFormat::kInt8>{});
    case WeightFormat::kInt4G32:
      return body(std::integral_constant<WeightFormat, WeightFormat::kInt4G32>{});
    case WeightFormat::kInt4G128:
      return body(std::integral_constant<WeightFormat, WeightFormat::kInt4G128>{});
    case WeightFormat::kFp8:
      return body(std::integral_constant<WeightFormat, WeightFormat::kFp8>{});
    case WeightFormat::kMxfp4:
      return body(std::integral_constant<WeightFormat, WeightFormat::kMxfp4>{});
    case WeightFormat::kNf4:
      break;
  }
  return body(std::integral_constant<WeightFormat, WeightFormat::kNf4>{});
}

// Asks for memory that is used soon but not next in any stream the hardware follows.
inline void prefetch(const std::uint8_t* first, std::int64_t bytes) {
  constexpr int kLineBytes = 64;
  asm("" : "+r"(first));  // one base for all lines: gcc would otherwise keep an address for each
  for (std::int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(first + at);
}

inline const float* f32_row(const LeftRows& a, std::int64_t row) {
  return static_cast<const float*>(a.base) + (a.rows == nullptr ? row : a.rows[row]) * a.stride;
}

constexpr int kWordRowBytes = kBlockRows * 4;  // the words of all rows at one depth step

// kRows x (kPanels * 16) elements of C.
template <typename I, int kRows, int kPanels>
struct Accumulators {
  static constexpr int kParts = kPanelColumns / I::kLanes;  // vectors in a panel's width
  typename I::Vec sum[kPanels][kParts][kRows];

  KT_INLINE void load(const float* c, std::int64_t c_stride) {
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          sum[p][v][m] = I::load(c + m * c_stride + p * kPanelColumns + v * I::kLanes);
        }
      }
    }
  }
  KT_INLINE void store(float* c, std::int64_t c_stride) const {
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          I::store(c + m * c_stride + p * kPanelColumns + v * I::kLanes, sum[p][v][m]);
        }
      }
    }
  }
};

// A row tile straight from the blocks of kPanels row blocks of W.
template <typename I, WeightFormat kFormat, int kRows, int kPanels>
void direct_tile(const float* const* a, const PackedMatrix& w, int row_block, int first_depth, int depth_blocks,
                 float* c, std::int64_t c_stride) {
  constexpr int kPerWord = values_per_word(kFormat), kParts = kPanelColumns / I::kLanes;
  using Reader = typename I::template Reader<kFormat>;
  Accumulators<I, kRows, kPanels> tile;
  tile.load(c, c_stride);
  const float* row[kRows];
  const std::uint8_t* words[kPanels];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) row[m] = a[m];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) words[p] = block_at<kFormat>(w, row_block + p, first_depth);
  // Without scales the blocks of a panel are one stream; with them the scales change from block to block.
  constexpr bool kScaled = scale_bytes(kFormat) > 0;
  const std::int64_t stretch = kScaled ? kBlockDepth : std::int64_t{depth_blocks} * kBlockDepth;
  for (int b = 0; b < (kScaled ? depth_blocks : 1); ++b) {
    Reader readers[kPanels][kParts];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      const std::uint8_t* scales = scales_at<kFormat>(w, row_block + p, first_depth + b);
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) readers[p][v] = Reader(scales, v);
    }
    const std::int64_t end = b * kBlockDepth + stretch;
    for (std::int64_t k = b * kBlockDepth; k < end; k += kPerWord) {
      typename I::Words loaded[kPanels][kParts];
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) loaded[p][v] = I::load_words(words[p] + v * I::kLanes * 4);
        words[p] += kWordRowBytes;
      }
      // Panels inside depths: their sums are independent chains, and a chain alone waits for every addition.
      unroll<kPerWord>([&](auto i) KT_LAMBDA_INLINE {
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
          typename I::Vec right[kParts];
#pragma GCC unroll 16
          for (int v = 0; v < kParts; ++v) right[v] = readers[p][v].template read<i.value>(loaded[p][v]);
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
            const typename I::Vec left = I::broadcast(row[m] + k + i.value);
#pragma GCC unroll 16
            for (int v = 0; v < kParts; ++v) tile.sum[p][v][m] = I::fma(left, right[v], tile.sum[p][v][m]);
          }
        }
      });
    }
  }
  tile.store(c, c_stride);
}

// One or two rows are too few chains of additions to keep the multipliers busy: several panels at a time make more.
template <typename I, WeightFormat kFormat, int kRows, int kPanels>
int direct_few_rows(const LeftRows& a, const PackedMatrix& w, const BlockRange& range, float* c,
                    std::int64_t c_stride) {
  const float* row[kRows];
  for (int m = 0; m < kRows; ++m) row[m] = f32_row(a, m);
  int j = 0;
  for (; j + kPanels <= range.row_blocks; j += kPanels) {
    direct_tile<I, kFormat, kRows, kPanels>(row, w, range.first_row + j, range.first_depth, range.depth_blocks,
                                            c + static_cast<std::int64_t>(j) * kBlockRows, c_stride);
  }
  return j;
}

template <typename I, WeightFormat kFormat>
void direct_forward(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                    std::int64_t c_stride) {
  int j = 0;
  if (rows == 1) j = direct_few_rows<I, kFormat, 1, I::kOneRowPanels>(a, w, range, c, c_stride);
  if (rows == 2) j = direct_few_rows<I, kFormat, 2, 2>(a, w, range, c, c_stride);
  for (; j < range.row_blocks; ++j) {
    for_each_tile(rows, I::kMaxRows, [&](int first, int count) {
      const float* row[I::kMaxRows];
      for (int m = 0; m < count; ++m) row[m] = f32_row(a, first + m);
      with_constant<I::kMaxRows>(count, [&](auto height) {
        direct_tile<I, kFormat, height.value, 1>(row, w, range.first_row + j, range.first_depth, range.depth_blocks,
                                                 c + first * c_stride + static_cast<std::int64_t>(j) * kBlockRows,
                                                 c_stride);
      });
    });
  }
}

template <typename I, WeightFormat kFormat>
void expand_forward(const PackedMatrix& w, int row_block, int first_depth, int depth_blocks, void* panel) {
  constexpr int kPerWord = values_per_word(kFormat), kParts = kPanelColumns / I::kLanes;
  using Reader = typename I::template Reader<kFormat>;
  float* target = static_cast<float*>(panel);
  const std::uint8_t* words = block_at<kFormat>(w, row_block, first_depth);
  for (int b = 0; b < depth_blocks; ++b) {
    const std::uint8_t* scales = scales_at<kFormat>(w, row_block, first_depth + b);
    Reader readers[kParts];
#pragma GCC unroll 16
    for (int v = 0; v < kParts; ++v) readers[v] = Reader(scales, v);
    for (int step = 0; step < kBlockDepth / kPerWord; ++step) {
      typename I::Words loaded[kParts];
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) loaded[v] = I::load_words(words + v * I::kLanes * 4);
      words += kWordRowBytes;
      unroll<kPerWord>([&](auto i) KT_LAMBDA_INLINE {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) {
          I::store(target + v * I::kLanes, readers[v].template read<i.value>(loaded[v]));
        }
        target += kPanelColumns;
      });
    }
  }
}

// The forward of a format that is read as it is multiplied.
template <typename I, WeightFormat kFormat>
void set_plain_forward(FormatKernels& kernels, int direct_rows) {
  kernels.direct_forward_rows = direct_rows;
  kernels.direct_forward = direct_forward<I, kFormat>;
  kernels.expand_forward = expand_forward<I, kFormat>;
}

// A row tile over expanded panels, `panel_floats` apart.
template <typename I, int kRows, int kPanels>
void panel_tile(const float* const* a, int depth, const float* panels, std::int64_t panel_floats, float* c,
                std::int64_t c_stride) {
  constexpr int kParts = kPanelColumns / I::kLanes;
  Accumulators<I, kRows, kPanels> tile;
  tile.load(c, c_stride);
  const float* row[kRows];
  const float* panel[kPanels];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) row[m] = a[m];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) panel[p] = panels + p * panel_floats;
  for (std::int64_t k = 0; k < depth; ++k) {
    typename I::Vec right[kPanels][kParts];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) right[p][v] = I::load(panel[p] + k * kPanelColumns + v * I::kLanes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename I::Vec left = I::broadcast(row[m] + k);
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) tile.sum[p][v][m] = I::fma(left, right[p][v], tile.sum[p][v][m]);
      }
    }
  }
  tile.store(c, c_stride);
}

template <typename I>
void multiply_panels(const LeftRows& a, int rows, int depth, const void* panels, std::int64_t panel_bytes,
                     int panel_count, float* c, std::int64_t c_stride) {
  const float* first_panel = static_cast<const float*>(panels);
  const std::int64_t panel_floats = panel_bytes / static_cast<std::int64_t>(sizeof(float));
  for_each_tile(rows, I::kMaxRows, [&](int first, int count) {
    const float* row[I::kMaxRows];
    for (int m = 0; m < count; ++m) row[m] = f32_row(a, first + m);
    with_constant<I::kMaxRows>(count, [&](auto height) {
      with_constant<I::kTilePanels>(panel_count, [&](auto width) {
        panel_tile<I, height.value, width.value>(row, depth, first_panel, panel_floats, c + first * c_stride, c_stride);
      });
    });
  });
}

// kRows x one panel's width of a sum over rows. `left` is read along m and `right` along n, so nothing is packed.
template <typename I, int kRows>
void outer_tile(const OuterRows& left, const OuterRows& right, int depth, std::int64_t m0, std::int64_t n0, float* c,
                std::int64_t c_stride) {
  constexpr int kParts = kPanelColumns / I::kLanes;
  Accumulators<I, kRows, 1> tile;
  tile.load(c, c_stride);
  for (int k = 0; k < depth; ++k) {
    const float* values = left.row(k) + m0;
    const float* line = right.row(k) + n0;
    typename I::Vec b[kParts];
#pragma GCC unroll 16
    for (int v = 0; v < kParts; ++v) b[v] = I::load(line + v * I::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename I::Vec value = I::broadcast(values + m);
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) tile.sum[0][v][m] = I::fma(value, b[v], tile.sum[0][v][m]);
    }
  }
  tile.store(c, c_stride);
}

// Fewer columns than a panel, e.g. LoRA of rank 8: both sides go through rows of a full panel's width.
template <typename I, int kRows>
void outer_edge(const OuterRows& left, const OuterRows& right, int depth, std::int64_t m0, std::int64_t n0, int columns,
                float* c, std::int64_t c_stride) {
  constexpr int kPieceDepth = 64;
  float lines[kPieceDepth * kPanelColumns], sums[kRows * kPanelColumns];
  for (int m = 0; m < kRows; ++m) {
    std::copy_n(c + m * c_stride, columns, sums + m * kPanelColumns);
    std::fill_n(sums + m * kPanelColumns + columns, kPanelColumns - columns, 0.0f);
  }
  for (int k0 = 0; k0 < depth; k0 += kPieceDepth) {
    const int piece = std::min(kPieceDepth, depth - k0);
    for (int k = 0; k < piece; ++k) {
      float* line = lines + k * kPanelColumns;
      std::copy_n(right.row(k0 + k) + n0, columns, line);
      std::fill_n(line + columns, kPanelColumns - columns, 0.0f);
    }
    const OuterRows from{left.rows == nullptr ? left.base + k0 * left.stride : left.base, left.stride,
                         left.rows == nullptr ? nullptr : left.rows + k0};
    outer_tile<I, kRows>(from, {lines, kPanelColumns, nullptr}, piece, m0, 0, sums, kPanelColumns);
  }
  for (int m = 0; m < kRows; ++m) std::copy_n(sums + m * kPanelColumns, columns, c + m * c_stride);
}

template <typename I>
void outer_sum(const OuterRows& left, const OuterRows& right, int depth, int rows, int columns, float* c,
               std::int64_t c_stride) {
  for_each_tile(rows, I::kMaxRows, [&](int m0, int count) {
    with_constant<I::kMaxRows>(count, [&](auto height) {
      float* target = c + m0 * c_stride;
      int n0 = 0;
      for (; n0 + kPanelColumns <= columns; n0 += kPanelColumns) {
        outer_tile<I, height.value>(left, right, depth, m0, n0, target + n0, c_stride);
      }
      if (n0 < columns) {
        outer_edge<I, height.value>(left, right, depth, m0, n0, columns - n0, target + n0, c_stride);
      }
    });
  });
}

inline void expand_kn_rows(const float* source, std::int64_t stride, int columns, int depth, void* target) {
  float* panel = static_cast<float*>(target);
  for (int k = 0; k < depth; ++k, panel += kPanelColumns) {
    std::copy_n(source + k * stride, columns, panel);
    std::fill(panel + columns, panel + kPanelColumns, 0.0f);
  }
}

}  // namespace
}  // namespace kt_expert
