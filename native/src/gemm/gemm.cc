// Few rows read the weights straight from their blocks. Many rows expand a group of panels once, for a slice of the
// reduction, and run all row tiles over it while it stays in the second-level cache.
#include "gemm/gemm.h"

#include <algorithm>

namespace kt_expert {
namespace {

// Depth of a slice. Many rows: a panel is then at most 128 KiB of fp32, so a group of three still fits a 512 KiB L2.
// Few rows: panels are used only once or twice, and short ones stay in L1 between being written and being read. C holds
// the same bits between slices as the registers would, so the choice does not show in a result.
constexpr int kSliceDepth = 2048;
constexpr int kShortSliceDepth = 128;
constexpr int kShortSliceRows = 16;

int slice_depth(int rows) { return rows <= kShortSliceRows ? kShortSliceDepth : kSliceDepth; }

constexpr int kPanelsPerBlock = kBlockDepth / kPanelColumns;

std::int64_t panel_bytes(const KernelTable& kernels, int depth) {
  return static_cast<std::int64_t>(depth) * kPanelColumns * operand_bytes(kernels.operand);
}

LeftRows advance(const KernelTable& kernels, const LeftRows& a, std::int64_t depth) {
  LeftRows moved = a;
  moved.base = static_cast<const char*>(a.base) + depth * operand_bytes(kernels.operand);
  return moved;
}

void multiply_backward_panels(const KernelTable& kernels, const LeftRows& a, int rows, const PackedMatrix& w,
                              int first_depth, int depth_blocks, float* c, std::int64_t c_stride,
                              const PanelScratch& scratch) {
  const FormatKernels& format = kernels.formats[static_cast<int>(w.shape.format)];
  const int row_blocks = w.shape.row_blocks();
  char* panels = static_cast<char*>(scratch.panels);
  const int slice_blocks = slice_depth(rows) / kBlockRows;
  for (int first = 0; first < row_blocks; first += slice_blocks) {
    const int slice = std::min(slice_blocks, row_blocks - first);
    const std::int64_t bytes = panel_bytes(kernels, slice * kBlockRows);
    for (int j = 0; j < depth_blocks; ++j) {
      format.expand_backward(w, first_depth + j, first, slice, panels, panels + bytes);
      for (int p = 0; p < kPanelsPerBlock; p += kernels.tile_panels) {
        kernels.multiply(advance(kernels, a, static_cast<std::int64_t>(first) * kBlockRows), rows, slice * kBlockRows,
                         panels + p * bytes, bytes, std::min(kernels.tile_panels, kPanelsPerBlock - p),
                         c + static_cast<std::int64_t>(j) * kBlockDepth + p * kPanelColumns, c_stride);
      }
    }
  }
}

constexpr int kSliceBlocks = kSliceDepth / kBlockDepth;
constexpr int kGroupedLines = kBlockDepth + 1;  // at most: a line of scales after every depth block
static_assert(kShortSliceDepth % kMostGroupDepth == 0 && kSliceDepth % kMostGroupDepth == 0,
              "slices hold whole groups");

std::int64_t most_panel_bytes(const KernelTable& kernels) {
  return std::max(kernels.tile_panels, kPanelsPerBlock) * panel_bytes(kernels, kSliceBlocks * kGroupedLines);
}

void multiply_forward_panels(const KernelTable& kernels, const LeftRows& a, int rows, const PackedMatrix& w,
                             int first_row, int row_blocks, float* c, std::int64_t c_stride,
                             const PanelScratch& scratch) {
  const FormatKernels& format = kernels.formats[static_cast<int>(w.shape.format)];
  const int depth_blocks = w.shape.depth_blocks(), slice_blocks = slice_depth(rows) / kBlockDepth;
  char* panels = static_cast<char*>(scratch.panels);
  float* starts = format.group_starts == nullptr ? nullptr : scratch.starts(kernels);
  for (int first = 0; first < depth_blocks; first += slice_blocks) {
    const int slice = std::min(slice_blocks, depth_blocks - first);
    const std::int64_t bytes =
        panel_bytes(kernels, slice * (format.multiply_grouped == nullptr ? kBlockDepth : kGroupedLines));
    const LeftRows part = advance(kernels, a, static_cast<std::int64_t>(first) * kBlockDepth);
    if (starts != nullptr) format.group_starts(part, rows, slice, starts, kMostProductRows);
    for (int j = 0; j < row_blocks; j += kernels.tile_panels) {
      const int group = std::min(kernels.tile_panels, row_blocks - j);
      float* target = c + static_cast<std::int64_t>(j) * kBlockRows;
      for (int p = 0; p < group; ++p) format.expand_forward(w, first_row + j + p, first, slice, panels + p * bytes);
      if (format.multiply_grouped != nullptr) {
        format.multiply_grouped(part, starts, kMostProductRows, rows, slice, panels, bytes, group, target, c_stride);
      } else {
        kernels.multiply(part, rows, slice * kBlockDepth, panels, bytes, group, target, c_stride);
      }
    }
  }
}

}  // namespace

std::int64_t panel_scratch_bytes(const KernelTable& kernels) {
  return most_panel_bytes(kernels) + std::int64_t{kMostProductRows} * kSliceBlocks * std::int64_t{sizeof(float)};
}

float* PanelScratch::starts(const KernelTable& kernels) const {
  return reinterpret_cast<float*>(static_cast<char*>(panels) + most_panel_bytes(kernels));
}

void multiply_forward(const KernelTable& kernels, const LeftRows& a, int rows, const PackedMatrix& w, int first_row,
                      int row_blocks, float* c, std::int64_t c_stride, const PanelScratch& scratch) {
  const FormatKernels& format = kernels.formats[static_cast<int>(w.shape.format)];
  const int depth_blocks = w.shape.depth_blocks();
  if (rows <= format.direct_forward_rows) {
    format.direct_forward(a, rows, w, {first_row, row_blocks, 0, depth_blocks}, c, c_stride);
    return;
  }
  multiply_forward_panels(kernels, a, rows, w, first_row, row_blocks, c, c_stride, scratch);
}

void multiply_backward(const KernelTable& kernels, const LeftRows& a, int rows, const PackedMatrix& w, int first_depth,
                       int depth_blocks, float* c, std::int64_t c_stride, const PanelScratch& scratch) {
  const FormatKernels& format = kernels.formats[static_cast<int>(w.shape.format)];
  const int columns = depth_blocks * kBlockDepth;
  if (format.to_word_order != nullptr) format.to_word_order(c, c_stride, rows, columns);
  if (rows <= format.direct_backward_rows) {
    format.direct_backward(a, rows, w, {0, w.shape.row_blocks(), first_depth, depth_blocks}, c, c_stride);
  } else {
    multiply_backward_panels(kernels, a, rows, w, first_depth, depth_blocks, c, c_stride, scratch);
  }
  if (format.to_column_order != nullptr) format.to_column_order(c, c_stride, rows, columns);
}

void multiply_f32(const KernelTable& kernels, const LeftRows& a, int rows, const F32Matrix& b, int columns, int depth,
                  float* c, std::int64_t c_stride, const PanelScratch& scratch) {
  const int direct = rows <= kernels.direct_f32_rows ? columns / kPanelColumns : 0;
  if (direct > 0) {
    const auto multiply = b.layout == RightLayout::kNK ? kernels.direct_f32_nk : kernels.direct_f32_kn;
    multiply(a, rows, b.data, b.stride, direct, depth, c, c_stride);
  }
  const int begin = direct * kPanelColumns;
  char* panels = static_cast<char*>(scratch.panels);
  for (int first = 0; begin < columns && first < depth; first += kSliceDepth) {
    const int slice = std::min(kSliceDepth, depth - first);
    const int padded = (slice + kernels.depth_step - 1) / kernels.depth_step * kernels.depth_step;
    const std::int64_t bytes = panel_bytes(kernels, padded);
    const int group_columns = kernels.tile_panels * kPanelColumns;
    for (int n0 = begin; n0 < columns; n0 += group_columns) {
      int group = 0;
      for (int n = n0; n < std::min(columns, n0 + group_columns); n += kPanelColumns, ++group) {
        const int width = std::min(kPanelColumns, columns - n);
        void* panel = panels + group * bytes;
        if (b.layout == RightLayout::kNK) {
          kernels.expand_f32_nk(b.data + n * b.stride + first, b.stride, width, slice, panel);
        } else {
          kernels.expand_f32_kn(b.data + first * b.stride + n, b.stride, width, slice, panel);
        }
      }
      kernels.multiply(advance(kernels, a, first), rows, padded, panels, bytes, group, c + n0, c_stride);
    }
  }
}

}  // namespace kt_expert
