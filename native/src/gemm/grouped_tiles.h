// Forward products with formats whose weights are codes times the scale of a group: a depth block's sum is taken over
// codes, and the scale applied to the sum instead of to every weight. Codes are used in the form that unpacks cheapest:
// unsigned, so that a group's sum starts at -offset times the sum of its activations, and where they lie in their word,
// so that read<i> is 2^kShift[i] times too large and activations are divided by as much before. Both factors are powers
// of two: the direct path and the panels, which hold plain codes, add up the same products to the same bits.
//
// I is a rung's vector set as in tile_loops.h. Its Codes<format> has kOffset, kShift[values per word], unpack(words),
// read<i>(unpacked) and scales(stored scales, part).
#pragma once

#include "gemm/tile_loops.h"

namespace kt_expert {
namespace {

// A panel's depth block: its codes, then a line of scales.
constexpr int kGroupLines = kBlockDepth + 1;

template <typename Codes>
constexpr bool shifts_codes() {
  for (const int shift : Codes::kShift) {
    if (shift != 0) return true;
  }
  return false;
}

template <typename Codes, int kIndex>
constexpr float unshift() {
  return 1.0f / static_cast<float>(std::int64_t{1} << Codes::kShift[kIndex]);
}

// -offset times the sum of 32 activations, in an order that no caller changes.
template <typename Codes>
float group_start(const float* a) {
  constexpr int kLanes = 8;
  float partial[kLanes] = {};
  for (int k = 0; k < kBlockDepth; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) partial[lane] += a[k + lane];
  }
  const float sum =
      ((partial[0] + partial[4]) + (partial[2] + partial[6])) + ((partial[1] + partial[5]) + (partial[3] + partial[7]));
  return -Codes::kOffset * sum;
}

template <typename Codes>
void group_starts(const LeftRows& a, int rows, int depth_blocks, float* starts, std::int64_t starts_stride) {
  for (int m = 0; m < rows; ++m) {
    const float* row = f32_row(a, m);
    for (int b = 0; b < depth_blocks; ++b) starts[m * starts_stride + b] = group_start<Codes>(row + b * kBlockDepth);
  }
}

template <typename I, int kRows, int kPanels>
struct GroupSums : Accumulators<I, kRows, kPanels> {
  using Base = Accumulators<I, kRows, kPanels>;
  using Base::kParts;
  using Base::sum;

  // `starts` is null where codes have no offset.
  KT_INLINE void start(const float* const* starts, std::int64_t group) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename I::Vec value = starts == nullptr ? I::zero() : I::broadcast(starts[m] + group);
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) sum[p][v][m] = value;
      }
    }
  }
  // c += sums times the scale of their column.
  template <typename Scale>
  KT_INLINE void finish(float* c, std::int64_t c_stride, const Scale& scale) const {
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) {
        const typename I::Vec factor = scale(p, v);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          float* target = c + m * c_stride + p * kPanelColumns + v * I::kLanes;
          I::store(target, I::fma(sum[p][v][m], factor, I::load(target)));
        }
      }
    }
  }
};

// Rows of activations as the codes of a format want them.
template <typename Codes, int kRows, int kDepth>
struct PreparedRows {
  static constexpr int kPerWord = std::extent_v<decltype(Codes::kShift)>;
  static constexpr bool kShifts = shifts_codes<Codes>(), kStarts = Codes::kOffset != 0.0f;

  PreparedRows(const float* const* rows, int depth) {
    for (int m = 0; m < kRows; ++m) {
      row[m] = rows[m];
      if constexpr (kStarts) {
        for (int b = 0; b < depth / kBlockDepth; ++b)
          start_values[m][b] = group_start<Codes>(rows[m] + b * kBlockDepth);
        start[m] = start_values[m];
      }
      if constexpr (kShifts) {
        for (int k = 0; k < depth; k += kPerWord) {
          unroll<kPerWord>([&](auto i) KT_LAMBDA_INLINE {
            shifted[m][k + i.value] = rows[m][k + i.value] * unshift<Codes, i.value>();
          });
        }
        row[m] = shifted[m];
      }
    }
  }
  const float* const* starts() const { return kStarts ? start : nullptr; }

  const float* row[kRows];
  const float* start[kRows];
  float shifted[kShifts ? kRows : 1][kShifts ? kDepth : 1];
  float start_values[kStarts ? kRows : 1][kStarts ? kDepth / kBlockDepth : 1];
};

// A row tile straight from the blocks of kPanels row blocks of W.
template <typename I, WeightFormat kFormat, int kRows, int kPanels>
void grouped_direct_tile(const float* const* a, const float* const* starts, const PackedMatrix& w, int row_block,
                         int first_depth, int depth_blocks, float* c, std::int64_t c_stride) {
  using Codes = typename I::template Codes<kFormat>;
  constexpr int kPerWord = values_per_word(kFormat), kParts = kPanelColumns / I::kLanes;
  const float* row[kRows];
  const std::uint8_t* words[kPanels];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) row[m] = a[m];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) words[p] = block_at<kFormat>(w, row_block + p, first_depth);
  for (int b = 0; b < depth_blocks; ++b) {
    GroupSums<I, kRows, kPanels> group;
    group.start(starts, b);
    for (std::int64_t k = std::int64_t{b} * kBlockDepth; k < std::int64_t{b + 1} * kBlockDepth; k += kPerWord) {
      typename Codes::Unpacked unpacked[kPanels][kParts];
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) unpacked[p][v] = Codes::unpack(I::load_words(words[p] + v * I::kLanes * 4));
        words[p] += kWordRowBytes;
      }
      unroll<kPerWord>([&](auto i) KT_LAMBDA_INLINE {
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
          typename I::Vec right[kParts];
#pragma GCC unroll 16
          for (int v = 0; v < kParts; ++v) right[v] = Codes::template read<i.value>(unpacked[p][v]);
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
            const typename I::Vec left = I::broadcast(row[m] + k + i.value);
#pragma GCC unroll 16
            for (int v = 0; v < kParts; ++v) group.sum[p][v][m] = I::fma(left, right[v], group.sum[p][v][m]);
          }
        }
      });
    }
    group.finish(c, c_stride, [&](int p, int v) KT_LAMBDA_INLINE {
      return Codes::scales(scales_at<kFormat>(w, row_block + p, first_depth + b), v);
    });
  }
}

// Activations of one call are prepared in pieces that stay in the first-level cache.
constexpr int kPreparedFloats = 4096;

template <typename I, WeightFormat kFormat, int kRows>
void grouped_direct_rows(const LeftRows& a, const PackedMatrix& w, const BlockRange& range, float* c,
                         std::int64_t c_stride) {
  constexpr int kDepth = kPreparedFloats / kRows / kBlockDepth * kBlockDepth;
  constexpr int kPanels = kRows == 1 ? I::kOneRowPanels : kRows == 2 ? 2 : 1;
  for (int first = 0; first < range.depth_blocks; first += kDepth / kBlockDepth) {
    const int blocks = std::min(kDepth / kBlockDepth, range.depth_blocks - first);
    const float* rows[kRows];
    for (int m = 0; m < kRows; ++m) rows[m] = f32_row(a, m) + std::int64_t{first} * kBlockDepth;
    const PreparedRows<typename I::template Codes<kFormat>, kRows, kDepth> prepared(rows, blocks * kBlockDepth);
    const auto tiles = [&](int j, auto panels) {
      grouped_direct_tile<I, kFormat, kRows, panels.value>(prepared.row, prepared.starts(), w, range.first_row + j,
                                                           range.first_depth + first, blocks,
                                                           c + static_cast<std::int64_t>(j) * kBlockRows, c_stride);
    };
    int j = 0;
    for (; j + kPanels <= range.row_blocks; j += kPanels) tiles(j, std::integral_constant<int, kPanels>{});
    for (; j < range.row_blocks; ++j) tiles(j, std::integral_constant<int, 1>{});
  }
}

template <typename I, WeightFormat kFormat, int kMostRows>
void grouped_direct_forward(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                            std::int64_t c_stride) {
  with_constant<kMostRows>(rows,
                           [&](auto count) { grouped_direct_rows<I, kFormat, count.value>(a, w, range, c, c_stride); });
}

template <typename I, WeightFormat kFormat>
void grouped_expand_forward(const PackedMatrix& w, int row_block, int first_depth, int depth_blocks, void* panel) {
  using Codes = typename I::template Codes<kFormat>;
  constexpr int kPerWord = values_per_word(kFormat), kParts = kPanelColumns / I::kLanes;
  float* target = static_cast<float*>(panel);
  const std::uint8_t* words = block_at<kFormat>(w, row_block, first_depth);
  for (int b = 0; b < depth_blocks; ++b) {
    for (int step = 0; step < kBlockDepth / kPerWord; ++step) {
      typename Codes::Unpacked unpacked[kParts];
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) unpacked[v] = Codes::unpack(I::load_words(words + v * I::kLanes * 4));
      words += kWordRowBytes;
      unroll<kPerWord>([&](auto i) KT_LAMBDA_INLINE {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) {
          typename I::Vec code = Codes::template read<i.value>(unpacked[v]);
          if constexpr (Codes::kShift[i.value] != 0) code = I::multiply(code, unshift<Codes, i.value>());
          I::store(target + v * I::kLanes, code);
        }
        target += kPanelColumns;
      });
    }
    const std::uint8_t* scales = scales_at<kFormat>(w, row_block, first_depth + b);
#pragma GCC unroll 16
    for (int v = 0; v < kParts; ++v) I::store(target + v * I::kLanes, Codes::scales(scales, v));
    target += kPanelColumns;
  }
}

template <typename I, int kRows, int kPanels>
void grouped_panel_tile(const float* const* a, const float* const* starts, int depth_blocks, const float* panels,
                        std::int64_t panel_floats, float* c, std::int64_t c_stride) {
  constexpr int kParts = kPanelColumns / I::kLanes;
  const float* row[kRows];
  const float* panel[kPanels];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) row[m] = a[m];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) panel[p] = panels + p * panel_floats;
  for (int b = 0; b < depth_blocks; ++b) {
    GroupSums<I, kRows, kPanels> group;
    group.start(starts, b);
    for (int i = 0; i < kBlockDepth; ++i) {
      typename I::Vec right[kPanels][kParts];
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) right[p][v] = I::load(panel[p] + i * kPanelColumns + v * I::kLanes);
      }
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const typename I::Vec left = I::broadcast(row[m] + std::int64_t{b} * kBlockDepth + i);
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
          for (int v = 0; v < kParts; ++v) group.sum[p][v][m] = I::fma(left, right[p][v], group.sum[p][v][m]);
        }
      }
    }
    group.finish(c, c_stride, [&](int p, int v) KT_LAMBDA_INLINE {
      return I::load(panel[p] + kBlockDepth * kPanelColumns + v * I::kLanes);
    });
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) panel[p] += kGroupLines * kPanelColumns;
  }
}

template <typename I>
void grouped_multiply(const LeftRows& a, const float* starts, std::int64_t starts_stride, int rows, int depth_blocks,
                      const void* panels, std::int64_t panel_bytes, int panel_count, float* c, std::int64_t c_stride) {
  const float* first_panel = static_cast<const float*>(panels);
  const std::int64_t panel_floats = panel_bytes / static_cast<std::int64_t>(sizeof(float));
  for_each_tile(rows, I::kMaxRows, [&](int first, int count) {
    const float *row[I::kMaxRows], *start[I::kMaxRows];
    for (int m = 0; m < count; ++m) {
      row[m] = f32_row(a, first + m);
      start[m] = starts + (first + m) * starts_stride;
    }
    with_constant<I::kMaxRows>(count, [&](auto height) {
      with_constant<I::kTilePanels>(panel_count, [&](auto width) {
        grouped_panel_tile<I, height.value, width.value>(row, starts == nullptr ? nullptr : start, depth_blocks,
                                                         first_panel, panel_floats, c + first * c_stride, c_stride);
      });
    });
  });
}

// The forward of a grouped format, taken from its blocks up to kDirectRows rows.
template <typename I, WeightFormat kFormat, int kDirectRows>
void set_grouped_forward(FormatKernels& kernels) {
  using Codes = typename I::template Codes<kFormat>;
  kernels.direct_forward_rows = kDirectRows;
  kernels.direct_forward = grouped_direct_forward<I, kFormat, kDirectRows>;
  kernels.expand_forward = grouped_expand_forward<I, kFormat>;
  kernels.panel_lines = kGroupLines;
  kernels.multiply_grouped = grouped_multiply<I>;
  if constexpr (Codes::kOffset != 0.0f) kernels.group_starts = group_starts<Codes>;
}

}  // namespace
}  // namespace kt_expert
