// The blocked product. For each slice of the reduction: expand a block of B once into panels (weights are read from
// memory once), pack blocks of A, and run register tiles over both while the B panel stays in the L1 cache.
#include <algorithm>

#include "gemm/kernels.h"

namespace kt_expert {
namespace {

constexpr int kColumnBlock = 128;  // B block: 128 columns x 384 deep x 4 bytes = 192 KiB, half of a 512 KiB L2
constexpr int kRowBlock = 48;      // A block: 48 rows x 384 deep x 4 bytes = 72 KiB, beside it in L2
constexpr std::int64_t kAlignFloats = 16;

int panels(int extent, int width) { return (extent + width - 1) / width; }

const float* row_pointer(const LeftOperand& a, int row) {
  return a.base + static_cast<std::int64_t>(a.rows == nullptr ? row : a.rows[row]) * a.stride;
}

// One panel of A: target[k * mr + m], zero for m >= rows.
void pack_panel(const KernelTable& kernels, const LeftOperand& a, int row0, int rows, int k0, int depth,
                float* target) {
  const int mr = kernels.mr;
  if (a.transposed) {
    for (int k = 0; k < depth; ++k) {
      const float* source = row_pointer(a, k0 + k) + row0;
      for (int m = 0; m < mr; ++m) target[k * mr + m] = m < rows ? a.scale * source[m] : 0.0f;
    }
    return;
  }
  const float* sources[kMaxRegisterRows];
  for (int m = 0; m < rows; ++m) sources[m] = row_pointer(a, row0 + m) + k0;
  kernels.pack(sources, rows, a.scale, depth, target);
}

// Rows of B, gathered where given, as they lie: LoRA matrices of the backward and activations of the LoRA gradients.
void copy_rows(const RightOperand& b, int nr, int column0, int columns, int k0, int depth, float* panel) {
  for (int k = 0; k < depth; ++k) {
    const std::int64_t row = b.rows == nullptr ? k0 + k : b.rows[k0 + k];
    float* target = panel + static_cast<std::int64_t>(k) * nr;
    std::copy_n(b.f32 + row * b.stride + column0, columns, target);
    std::fill(target + columns, target + nr, 0.0f);
  }
}

void expand_panel(const KernelTable& kernels, const RightOperand& b, int column0, int columns, int k0, int depth,
                  float* panel) {
  if (b.bf16 == nullptr && b.layout == RightLayout::kNK) {
    kernels.expand_f32_nk(b.f32 + static_cast<std::int64_t>(column0) * b.stride + k0, b.stride, columns, depth, panel);
  } else if (b.bf16 == nullptr) {
    copy_rows(b, kernels.nr, column0, columns, k0, depth, panel);
  } else if (b.layout == RightLayout::kNK) {
    kernels.expand_bf16_nk(b.bf16 + static_cast<std::int64_t>(column0) * b.stride + k0, b.stride, columns, depth,
                           panel);
  } else {
    kernels.expand_bf16_kn(b.bf16 + static_cast<std::int64_t>(k0) * b.stride + column0, b.stride, columns, depth,
                           panel);
  }
}

struct Block {
  int first;
  int count;
};

void multiply_block(const KernelTable& kernels, Block rows, Block columns, int depth, const GemmScratch& scratch,
                    float* c, std::int64_t c_stride) {
  const std::int64_t a_step = static_cast<std::int64_t>(depth) * kernels.mr;
  const std::int64_t b_step = static_cast<std::int64_t>(depth) * kernels.nr;
  for (int jp = 0; jp < panels(columns.count, kernels.nr); ++jp) {
    const int column = jp * kernels.nr;
    for (int ip = 0; ip < panels(rows.count, kernels.mr); ++ip) {
      const int row = ip * kernels.mr;
      float* tile = c + static_cast<std::int64_t>(rows.first + row) * c_stride + columns.first + column;
      kernels.multiply(depth, scratch.a_block + ip * a_step, scratch.b_block + jp * b_step, tile, c_stride,
                       std::min(kernels.mr, rows.count - row), std::min(kernels.nr, columns.count - column));
    }
  }
}

}  // namespace

std::int64_t gemm_scratch_floats(const KernelTable& kernels) {
  const std::int64_t a_rows = static_cast<std::int64_t>(panels(kRowBlock, kernels.mr)) * kernels.mr;
  const std::int64_t b_columns = static_cast<std::int64_t>(panels(kColumnBlock, kernels.nr)) * kernels.nr;
  const std::int64_t floats = (a_rows + b_columns) * kernels.max_depth + kPackSlack;
  return (floats + kAlignFloats - 1) / kAlignFloats * kAlignFloats;
}

GemmScratch gemm_scratch_at(const KernelTable& kernels, float* base) {
  const std::int64_t b_columns = static_cast<std::int64_t>(panels(kColumnBlock, kernels.nr)) * kernels.nr;
  return GemmScratch{base + b_columns * kernels.max_depth, base};
}

void gemm_accumulate(const KernelTable& kernels, int rows, int columns, int depth, const LeftOperand& a,
                     const RightOperand& b, float* c, std::int64_t c_stride, const GemmScratch& scratch) {
  for (int n0 = 0; n0 < columns; n0 += kColumnBlock) {
    const Block column_block{n0, std::min(kColumnBlock, columns - n0)};
    for (int k0 = 0; k0 < depth; k0 += kernels.max_depth) {
      const int slice = std::min(kernels.max_depth, depth - k0);
      for (int jp = 0; jp < panels(column_block.count, kernels.nr); ++jp) {
        const int column = jp * kernels.nr;
        expand_panel(kernels, b, n0 + column, std::min(kernels.nr, column_block.count - column), k0, slice,
                     scratch.b_block + static_cast<std::int64_t>(jp) * slice * kernels.nr);
      }
      for (int m0 = 0; m0 < rows; m0 += kRowBlock) {
        const Block row_block{m0, std::min(kRowBlock, rows - m0)};
        for (int ip = 0; ip < panels(row_block.count, kernels.mr); ++ip) {
          const int row = ip * kernels.mr;
          pack_panel(kernels, a, m0 + row, std::min(kernels.mr, row_block.count - row), k0, slice,
                     scratch.a_block + static_cast<std::int64_t>(ip) * slice * kernels.mr);
        }
        multiply_block(kernels, row_block, column_block, slice, scratch, c, c_stride);
      }
    }
  }
}

}  // namespace kt_expert
