// Forward products with formats whose weights are codes times the scale of a group of depths: a group's sum is taken
// over codes, and the scale applied to the sum instead of to every weight. Codes are used in the form that unpacks
// cheapest: unsigned, so that a group's sum starts at -offset times the sum of its activations, and where they lie in
// their word, so that read<i> is 2^kShift[i] times too large and activations are divided by as much before. Both
// factors are powers of two: the direct path and the panels, which hold plain codes, add up the same products to the
// same bits. (Only activations below 2^-102 could tell them apart: divided, they are no longer normal numbers.)
//
// I is an ISA's vector set as in tile_loops.h. Its Codes<format> has kOffset, kShift[values per word], unpack(words),
// read<i>(unpacked) and scales(stored scales, part).
#pragma once

#include "gemm/tile_loops.h"

namespace kt_expert {
namespace {

// Depth blocks of a group. Where a scale goes on for longer, its sums still start afresh here, for what codes carry on
// top must not grow large beside them.
constexpr int kMostGroupBlocks = kMostGroupDepth / kBlockDepth;
constexpr int group_blocks(WeightFormat format) {
  return scale_group(format) == kWholeRow ? kMostGroupBlocks : scale_group(format) / kBlockDepth;
}
// Depths of the next group where so many blocks are left; a constant where groups are single blocks.
template <int kGroup>
constexpr int group_depth(int blocks_left) {
  return kGroup == 1 ? kBlockDepth : std::min(kGroup, blocks_left) * kBlockDepth;
}

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

// -offset times the sum of a group's activations, in an order that no caller changes.
template <typename Codes>
float group_start(const float* a, int depth) {
  constexpr int kLanes = 8;
  float partial[kLanes] = {};
  for (int k = 0; k < depth; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) partial[lane] += a[k + lane];
  }
  const float sum =
      ((partial[0] + partial[4]) + (partial[2] + partial[6])) + ((partial[1] + partial[5]) + (partial[3] + partial[7]));
  return -Codes::kOffset * sum;
}

// One row's, of all groups.
template <typename Codes, int kGroup>
void row_starts(const float* a, int depth_blocks, float* starts, std::int64_t starts_stride) {
  for (int b = 0; b < depth_blocks; b += kGroup, starts += starts_stride) {
    *starts = group_start<Codes>(a + b * kBlockDepth, group_depth<kGroup>(depth_blocks - b));
  }
}

template <typename Codes, int kGroup>
void group_starts(const LeftRows& a, int rows, int depth_blocks, float* starts, std::int64_t starts_stride) {
  for (int m = 0; m < rows; ++m) {
    row_starts<Codes, kGroup>(f32_row(a, m), depth_blocks, starts + m, starts_stride);
  }
}

template <typename I, int kRows, int kPanels>
struct GroupSums : Accumulators<I, kRows, kPanels> {
  using Base = Accumulators<I, kRows, kPanels>;
  using Base::kParts;
  using Base::sum;

  // `starts` holds a value a row, or is null where codes have no offset.
  KT_INLINE void start(const float* starts) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename I::Vec value = starts == nullptr ? I::zero() : I::broadcast(starts + m);
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) sum[p][v][m] = value;
      }
    }
  }
  // totals += sums times the scale of their column.
  template <typename Scale>
  KT_INLINE void finish(float* totals, std::int64_t stride, const Scale& scale) const {
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) {
        const typename I::Vec factor = scale(p, v);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          float* target = totals + m * stride + p * kPanelColumns + v * I::kLanes;
          I::store(target, I::fma(sum[p][v][m], factor, I::load(target)));
        }
      }
    }
  }
};

// A tile of C between groups: at a fixed stride, so that no registers are spent on where its rows are.
template <int kRows, int kColumns>
class Totals {
 public:
  Totals(float* c, std::int64_t c_stride) : c_(c), c_stride_(c_stride) {
    for (int m = 0; m < kRows; ++m) std::copy_n(c + m * c_stride, kColumns, values_[m]);
  }
  ~Totals() {
    for (int m = 0; m < kRows; ++m) std::copy_n(values_[m], kColumns, c_ + m * c_stride_);
  }
  Totals(const Totals&) = delete;
  Totals& operator=(const Totals&) = delete;

  // Behind an address the compiler cannot follow: it would otherwise keep every value twice.
  KT_INLINE float* first() {
    float* first = values_[0];
    asm volatile("" : "+r"(first) : : "memory");
    return first;
  }

 private:
  alignas(64) float values_[kRows][kColumns];
  float* c_;
  std::int64_t c_stride_;
};

// Rows of activations as the codes of a format want them.
template <typename Codes, int kGroup, int kRows, int kDepth>
struct PreparedRows {
  static constexpr int kPerWord = std::extent_v<decltype(Codes::kShift)>;
  static constexpr bool kShifts = shifts_codes<Codes>(), kStarts = Codes::kOffset != 0.0f;

  PreparedRows(const float* const* rows, int depth) {
    for (int m = 0; m < kRows; ++m) {
      row[m] = rows[m];
      if constexpr (kStarts) {
        row_starts<Codes, kGroup>(rows[m], depth / kBlockDepth, start_values[0] + m, kRows);
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
  const float* starts() const { return kStarts ? start_values[0] : nullptr; }

  const float* row[kRows];
  float shifted[kShifts ? kRows : 1][kShifts ? kDepth : 1];
  float start_values[kStarts ? kDepth / kBlockDepth : 1][kRows];  // [groups][rows]
};

// A row tile straight from the blocks of kPanels row blocks of W.
template <typename I, WeightFormat kFormat, int kRows, int kPanels>
void grouped_direct_tile(const float* const* a, const float* starts, const PackedMatrix& w, int row_block,
                         int first_depth, int depth_blocks, float* c, std::int64_t c_stride) {
  using Codes = typename I::template Codes<kFormat>;
  constexpr int kPerWord = values_per_word(kFormat), kParts = kPanelColumns / I::kLanes;
  const float* row[kRows];
  const std::uint8_t* words[kPanels];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) row[m] = a[m];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) words[p] = block_at<kFormat>(w, row_block + p, first_depth);
  constexpr int kGroup = group_blocks(kFormat);
  constexpr std::int64_t kAheadBytes = 1536;  // hides memory's latency, stays in the first-level cache
  const std::int64_t skipped = (std::int64_t{kPanels} * w.depth_blocks - depth_blocks) * block_bytes(kFormat);
  for (int b = 0; b < depth_blocks; b += kGroup) {
    GroupSums<I, kRows, kPanels> group;
    group.start(starts == nullptr ? nullptr : starts + std::int64_t{b / kGroup} * kRows);
    // What the next panels begin with follows this group of panels, not this panel.
    const std::int64_t here = std::int64_t{b} * block_bytes(kFormat) + kAheadBytes;
    const std::int64_t ahead = kAheadBytes + (here < depth_blocks * block_bytes(kFormat) ? 0 : skipped);
    const std::int64_t end = std::int64_t{b} * kBlockDepth + group_depth<kGroup>(depth_blocks - b);
    for (std::int64_t k = std::int64_t{b} * kBlockDepth; k < end; k += kPerWord) {
      typename Codes::Unpacked unpacked[kPanels][kParts];
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kParts; ++v) unpacked[p][v] = Codes::unpack(I::load_words(words[p] + v * I::kLanes * 4));
        if constexpr (kPanels > 1) __builtin_prefetch(words[p] + ahead);
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
  constexpr int kGroup = group_blocks(kFormat);
  constexpr int kDepth = kPreparedFloats / kRows / kMostGroupDepth * kMostGroupDepth;
  constexpr int kPanels = kRows == 1 ? I::kOneRowPanels : kRows == 2 ? 2 : 1;
  for (int first = 0; first < range.depth_blocks; first += kDepth / kBlockDepth) {
    const int blocks = std::min(kDepth / kBlockDepth, range.depth_blocks - first);
    const float* rows[kRows];
    for (int m = 0; m < kRows; ++m) rows[m] = f32_row(a, m) + std::int64_t{first} * kBlockDepth;
    const PreparedRows<typename I::template Codes<kFormat>, kGroup, kRows, kDepth> prepared(rows, blocks * kBlockDepth);
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
    if ((b + 1) % group_blocks(kFormat) != 0 && b + 1 < depth_blocks) continue;
    const std::uint8_t* scales = scales_at<kFormat>(w, row_block, first_depth + b);
#pragma GCC unroll 16
    for (int v = 0; v < kParts; ++v) I::store(target + v * I::kLanes, Codes::scales(scales, v));
    target += kPanelColumns;
  }
}

template <typename I, int kGroup, int kRows, int kPanels>
void grouped_panel_tile(const float* const* a, const float* starts, std::int64_t starts_stride, int depth_blocks,
                        const float* panels, std::int64_t panel_floats, float* c, std::int64_t c_stride) {
  constexpr int kParts = kPanelColumns / I::kLanes;
  const float* row[kRows];
  const float* panel[kPanels];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) row[m] = a[m];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) panel[p] = panels + p * panel_floats;
  Totals<kRows, kPanels * kPanelColumns> totals(c, c_stride);
  for (int b = 0; b < depth_blocks; b += kGroup) {
    GroupSums<I, kRows, kPanels> group;
    group.start(starts == nullptr ? nullptr : starts + b / kGroup * starts_stride);
    const int depth = group_depth<kGroup>(depth_blocks - b);
    for (int i = 0; i < depth; ++i) {
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
    group.finish(totals.first(), kPanels * kPanelColumns, [&](int p, int v) KT_LAMBDA_INLINE {
      return I::load(panel[p] + depth * kPanelColumns + v * I::kLanes);
    });
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) panel[p] += (depth + 1) * kPanelColumns;
  }
}

template <typename I, int kGroup>
void grouped_multiply(const LeftRows& a, const float* starts, std::int64_t starts_stride, int rows, int depth_blocks,
                      const void* panels, std::int64_t panel_bytes, int panel_count, float* c, std::int64_t c_stride) {
  const float* first_panel = static_cast<const float*>(panels);
  const std::int64_t panel_floats = panel_bytes / static_cast<std::int64_t>(sizeof(float));
  for_each_tile(rows, I::kMaxRows, [&](int first, int count) {
    const float* row[I::kMaxRows] = {};
    for (int m = 0; m < count; ++m) row[m] = f32_row(a, first + m);
    const float* start = starts == nullptr ? nullptr : starts + first;
    with_constant<I::kMaxRows>(count, [&](auto height) {
      with_constant<I::kTilePanels>(panel_count, [&](auto width) {
        grouped_panel_tile<I, kGroup, height.value, width.value>(row, start, starts_stride, depth_blocks, first_panel,
                                                                 panel_floats, c + first * c_stride, c_stride);
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
  kernels.multiply_grouped = grouped_multiply<I, group_blocks(kFormat)>;
  if constexpr (Codes::kOffset != 0.0f) kernels.group_starts = group_starts<Codes, group_blocks(kFormat)>;
}

}  // namespace
}  // namespace kt_expert
