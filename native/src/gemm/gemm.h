// Products on top of a kernel table: which path a product takes, and the scratch it needs.
#pragma once

#include <cstdint>

#include "gemm/kernels.h"

namespace kt_expert {

constexpr int kMostProductRows = 192;  // rows of A in one call

// Of one worker: panels, for weights in formats that are expanded and for LoRA matrices, and where the sums of grouped
// formats start.
struct PanelScratch {
  void* panels = nullptr;

  float* starts(const KernelTable& kernels) const;
};
std::int64_t panel_scratch_bytes(const KernelTable& kernels);

// C[m, 16 j + n] += sum over k of A(m, k) W(16 (first_row + j) + n, k). A's rows hold the padded depth.
void multiply_forward(const KernelTable& kernels, const LeftRows& a, int rows, const PackedMatrix& w, int first_row,
                      int row_blocks, float* c, std::int64_t c_stride, const PanelScratch& scratch);

// C[m, 32 j + i] += sum over n of A(m, n) W(n, 32 (first_depth + j) + i). A's rows hold the padded rows of W.
void multiply_backward(const KernelTable& kernels, const LeftRows& a, int rows, const PackedMatrix& w, int first_depth,
                       int depth_blocks, float* c, std::int64_t c_stride, const PanelScratch& scratch);

enum class RightLayout {
  kNK,  // element (k, n) is data[n * stride + k]
  kKN,  // element (k, n) is data[k * stride + n]
};

struct F32Matrix {
  const float* data = nullptr;
  std::int64_t stride = 0;
  RightLayout layout = RightLayout::kNK;
};

// C[m, n] += sum over k < depth of A(m, k) B(k, n), for a small fp32 matrix B such as LoRA's. Columns of C up to the
// next multiple of kPanelColumns are written too.
void multiply_f32(const KernelTable& kernels, const LeftRows& a, int rows, const F32Matrix& b, int columns, int depth,
                  float* c, std::int64_t c_stride, const PanelScratch& scratch);

}  // namespace kt_expert
