// The kernel registry: one table of functions per instruction set.
//
// A product C += A B takes A as rows of operands (fp32, or bf16 on the ISAs that multiply bf16) and B either from the
// resident blocks of a weight matrix or from panels: [depth][16 columns] of operands, in the order the multiply wants.
// Every element of C is one chain of fused multiply-adds in ascending order of the reduction index (of formats
// multiplied by groups: one chain a group, and one over the groups), whatever the number of rows, the path or the
// thread. That is what makes a result independent of the tokens that share the batch and of the thread count.
//
// C blocks are scratch: fp32, their width a multiple of kPanelColumns, their stride a multiple of 16, with room for
// kRowSlack rows past the last; so no kernel has an edge in columns.
#pragma once

#include <cstdint>

#include "kt_expert/bf16.h"
#include "kt_expert/cpu_features.h"
#include "kt_expert/layer.h"
#include "kt_expert/optimizer.h"
#include "kt_expert/packed_matrix.h"

namespace kt_expert {

constexpr int kPanelColumns = 16;
constexpr int kRowSlack = 32;    // rows a tile may read past A's last and write past C's last; what they hold is unused
constexpr int kDepthAlign = 32;  // rows of A are zero up to a multiple of this
constexpr int kAllRows = 1 << 30;

enum class OperandType { kF32, kBf16 };
constexpr int operand_bytes(OperandType type) { return type == OperandType::kF32 ? 4 : 2; }

// Rows of A: element (m, k) is base[row(m) * stride + k], in operands of the ISA; `rows`, where given, gathers.
struct LeftRows {
  const void* base = nullptr;
  std::int64_t stride = 0;
  const std::int32_t* rows = nullptr;
};

// fp32 rows of a sum over rows: element (k, i) is base[row(k) * stride + i].
struct OuterRows {
  const float* base = nullptr;
  std::int64_t stride = 0;
  const std::int32_t* rows = nullptr;

  const float* row(std::int64_t k) const { return base + (rows == nullptr ? k : rows[k]) * stride; }
};

// Blocks [first_row, first_row + row_blocks) x [first_depth, first_depth + depth_blocks) of a matrix.
struct BlockRange {
  int first_row = 0;
  int row_blocks = 0;
  int first_depth = 0;
  int depth_blocks = 0;
};

// Whether fp32 ISAs multiply a format's codes and apply the scale to the sum of a group of depths. fp8 is not: a code
// needs a multiplication to become a number, and the scale rides on it.
constexpr int kMostGroupDepth = 128;
constexpr bool is_grouped(WeightFormat format) { return format != WeightFormat::kBf16 && format != WeightFormat::kFp8; }

// How one ISA reads one weight format. `direct_*` take weights from their blocks and are used up to that many rows;
// above, the blocks are expanded once into panels and every row tile reads those.
//
// The backward may work on columns of C in the order in which a format's words give them: `to_word_order` brings C into
// it before and `to_column_order` back after; both are null where the orders are the same. Columns come in whole depth
// blocks.
struct FormatKernels {
  int direct_forward_rows;
  int direct_backward_rows;
  // C[m, n - 16 first_row] += sum over the range's depths of A(m, k - 32 first_depth) W(n, k).
  void (*direct_forward)(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                         std::int64_t c_stride);
  // C[m, k - 32 first_depth] += sum over the range's rows of A(m, n - 16 first_row) W(n, k).
  void (*direct_backward)(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                          std::int64_t c_stride);
  // One row block, the range's depths: the panel of the forward.
  void (*expand_forward)(const PackedMatrix& w, int row_block, int first_depth, int depth_blocks, void* panel);
  // Where given, the forward's panels are multiplied by this instead: they hold codes and, after every group of depth
  // blocks, a line of scales, which are applied to the group's sum. Sums start at starts[group * starts_stride + m],
  // which `group_starts` computes from A; where that is null, at zero. Ranges begin at multiples of kMostGroupDepth.
  void (*multiply_grouped)(const LeftRows& a, const float* starts, std::int64_t starts_stride, int rows,
                           int depth_blocks, const void* panels, std::int64_t panel_bytes, int panel_count, float* c,
                           std::int64_t c_stride);
  void (*group_starts)(const LeftRows& a, int rows, int depth_blocks, float* starts, std::int64_t starts_stride);
  // One depth block, the range's rows: the two panels of the backward, 16 columns each.
  void (*expand_backward)(const PackedMatrix& w, int depth_block, int first_row, int row_blocks, void* panel0,
                          void* panel1);
  void (*to_word_order)(float* c, std::int64_t c_stride, int rows, int columns);
  void (*to_column_order)(float* c, std::int64_t c_stride, int rows, int columns);
};

// Rows of A quantised to int8, one scale a row, zero up to a multiple of kIntegerDepthAlign.
struct IntegerRows {
  const std::int8_t* base = nullptr;
  std::int64_t stride = 0;
  const float* scales = nullptr;
};
constexpr int kIntegerDepthAlign = 64;  // one TDPBSSD

// Forward products in integers, exact up to the two scales: int8 weights times rows quantised on the way in. Only ISAs
// chosen by name have them, because rounding activations to eight bits is a choice about accuracy.
struct IntegerKernels {
  const char* name;
  // Largest magnitude to 127; returns the scale, 0 for a row of zeros.
  float (*quantise)(const float* values, std::int64_t count, std::int8_t* target);
  // C[m, 16 j + n] += row scale * column scale * sum over k of A(m, k) W(16 (first_row + j) + n, k).
  void (*multiply)(const IntegerRows& a, int rows, const PackedMatrix& w, int first_row, int row_blocks, float* c,
                   std::int64_t c_stride);
};

// Entry points of one ISA. Strides count elements. No pointer needs an alignment.
struct KernelTable {
  Isa isa;
  const char* name;  // of everything but integer products
  OperandType operand;
  int tile_rows;    // rows of one register tile
  int tile_panels;  // panels `multiply` works on at a time
  int depth_step;   // panels hold a multiple of this many depths
  bool gathers;     // `multiply` and `direct_*` follow LeftRows::rows; otherwise rows must be contiguous

  FormatKernels formats[kWeightFormats];
  const IntegerKernels* integer;  // null on ISAs without

  // Panels of `columns` <= 16 rows (nk: a row holds the reduction) or columns (kn) of an fp32 matrix, zero elsewhere;
  // depth is padded to depth_step.
  void (*expand_f32_nk)(const float* source, std::int64_t stride, int columns, int depth, void* panel);
  void (*expand_f32_kn)(const float* source, std::int64_t stride, int columns, int depth, void* panel);
  // The product with whole panels of such a matrix from where it lies, for up to direct_f32_rows rows; 0 on ISAs
  // without.
  int direct_f32_rows;
  void (*direct_f32_nk)(const LeftRows& a, int rows, const float* source, std::int64_t stride, int panels, int depth,
                        float* c, std::int64_t c_stride);
  void (*direct_f32_kn)(const LeftRows& a, int rows, const float* source, std::int64_t stride, int panels, int depth,
                        float* c, std::int64_t c_stride);
  // C[m, 16 p + n] += sum over k < depth of A(m, k) panel_p(k, n), for p < panels <= tile_panels.
  void (*multiply)(const LeftRows& a, int rows, int depth, const void* panels, std::int64_t panel_stride,
                   int panel_count, float* c, std::int64_t c_stride);
  // C[m, n] += sum over k < depth of left(k, m) right(k, n): any number of columns, C exactly as wide.
  void (*outer)(const OuterRows& left, const OuterRows& right, int depth, int rows, int columns, float* c,
                std::int64_t c_stride);

  void (*activate)(const ActivationSpec& spec, const float* gate, const float* up, float* h, std::int64_t count);
  // d_gate and d_up may overwrite gate and up.
  void (*activate_backward)(const ActivationSpec& spec, const float* gate, const float* up, const float* d_h,
                            float* d_gate, float* d_up, std::int64_t count);

  void (*bf16_to_f32)(const bf16_t* source, float* target, std::int64_t count);
  void (*f32_to_bf16)(const float* source, bf16_t* target, std::int64_t count);
  void (*scale)(float factor, float* target, std::int64_t count);                            // target *= factor
  void (*add_scaled)(float factor, const float* source, float* target, std::int64_t count);  // target += factor*source
  float (*dot)(const float* left, const float* right, std::int64_t count);
  double (*sum_squares)(const float* values, std::int64_t count);
  // By the moments' type. `first` is the index of the first element in its tensor, for the rounding of bf16 moments.
  // Without momentum there is no buffer: null.
  void (*adam[kMomentTypes])(const struct AdamStep& step, const float* gradient, float* parameter, void* exp_avg,
                             void* exp_avg_sq, std::uint32_t first, std::int64_t count);
  void (*sgd[kMomentTypes])(const struct SgdStep& step, const float* gradient, float* parameter, void* momentum_buffer,
                            std::uint32_t first, std::int64_t count);
  // Sums of squares of every row and of every column of a matrix [rows, columns].
  void (*line_squares)(const float* matrix, std::int64_t rows, std::int64_t columns, float* of_rows, float* of_columns);
  // Sum of squares of the update an estimate makes of a gradient [rows, columns].
  double (*factored_squares)(const struct FactoredEstimate& estimate, const float* gradient, std::int64_t rows,
                             std::int64_t columns);
  // parameter += factor * that update
  void (*factored_apply)(const struct FactoredEstimate& estimate, float factor, const float* gradient, float* parameter,
                         std::int64_t rows, std::int64_t columns);

  // What the ISA's products are bound by: multiply-adds without memory (returns the flop done in `rounds`), and memory
  // without arithmetic (`count` floats, a multiple of 128).
  double (*burn)(std::int64_t rounds);
  void (*read)(const float* source, std::int64_t count);
};

struct AdamStep {
  double learning_rate;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_scale;        // clip scale and averaging, applied to the gradient first
  double bias_correction1;  // 1 - beta1^step
  double bias_correction2;  // 1 - beta2^step
  bool decoupled;           // weight decay apart from the gradient
  std::uint32_t rounding;   // differs from step to step and from tensor to tensor
};

struct SgdStep {
  double learning_rate;
  double momentum;
  double dampening;
  double weight_decay;
  double grad_scale;
  bool nesterov;
  bool first;  // the first gradient fills the buffer undampened
  std::uint32_t rounding;
};

// What a factored second moment makes of a gradient: update = scale * gradient / sqrt(max(row * column, least)).
struct FactoredEstimate {
  const float* rows;
  const float* columns;
  const float* row_roots;  // 1 / sqrt of each
  const float* column_roots;
  float least;
  float scale;
};

// The table of one instruction set; throws Unsupported where the machine cannot run it.
const KernelTable& kernels_for(Isa isa);

const KernelTable& scalar_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_vnni_kernels();
const KernelTable& avx512_bf16_kernels();
const KernelTable& amx_bf16_kernels();
const KernelTable& amx_int8_kernels();

}  // namespace kt_expert
