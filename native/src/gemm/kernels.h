// The kernel registry: one table of functions per instruction set, and the matrix product built on it.
//
// Every element of a product is one chain of fused multiply-adds in ascending order of the reduction index, whatever
// the number of rows, the blocking or the thread. That is what makes a result independent of the tokens that share the
// batch and of the thread count.
#pragma once

#include <cstdint>

#include "kt_expert/bf16.h"
#include "kt_expert/cpu_features.h"
#include "kt_expert/layer.h"

namespace kt_expert {

struct AdamWStep {
  double learning_rate;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_scale;        // clip scale and averaging, applied to the gradient first
  double bias_correction1;  // 1 - beta1^step
  double bias_correction2;  // 1 - beta2^step
};

constexpr int kPackSlack = 16;        // floats a pack may write past its panel
constexpr int kMaxRegisterRows = 32;  // no rung's register tile is taller

// Entry points of one rung of the ladder. Strides count elements. No pointer needs an alignment.
struct KernelTable {
  Isa isa;
  const char* name;
  int mr;         // rows of one register tile
  int nr;         // columns of one register tile
  int max_depth;  // reduction steps expanded into a panel at a time

  // panel[k * nr + n] = B(k, n) in fp32, zero for n in [columns, nr).
  // nk: row n of the source holds the reduction (W of X W^T). kn: row k holds the columns (W of X W).
  void (*expand_bf16_nk)(const bf16_t* source, std::int64_t stride, int columns, int depth, float* panel);
  void (*expand_bf16_kn)(const bf16_t* source, std::int64_t stride, int columns, int depth, float* panel);
  void (*expand_f32_nk)(const float* source, std::int64_t stride, int columns, int depth, float* panel);

  // panel[k * mr + m] = scale * rows[m][k] for m < count, zero for m in [count, mr). May write up to kPackSlack floats
  // past the panel; they are overwritten by the next panel or lie in the scratch's slack.
  void (*pack)(const float* const* rows, int count, float scale, int depth, float* panel);

  // c[m * c_stride + n] += sum over k of a_panel[k * mr + m] * b_panel[k * nr + n], for m < rows, n < columns.
  void (*multiply)(int depth, const float* a_panel, const float* b_panel, float* c, std::int64_t c_stride, int rows,
                   int columns);

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
  void (*adamw)(const AdamWStep& step, const float* gradient, float* parameter, float* exp_avg, float* exp_avg_sq,
                std::int64_t count);
};

// The table of one instruction set; throws Unsupported where the machine cannot run it.
const KernelTable& kernels_for(Isa isa);

const KernelTable& scalar_kernels();
const KernelTable& avx2_kernels();

// Left operand, fp32: element (m, k) is base[row(m) * stride + k], or with `transposed` base[row(k) * stride + m].
// `rows`, where given, gathers: row(i) = rows[i].
struct LeftOperand {
  const float* base = nullptr;
  std::int64_t stride = 0;
  const std::int32_t* rows = nullptr;
  bool transposed = false;
  float scale = 1.0f;
};

enum class RightLayout { kNK, kKN };

// Right operand, bf16 or fp32 (exactly one pointer set). kNK: element (k, n) is base[n * stride + k];
// kKN: base[row(k) * stride + n], gathered through `rows` where given (fp32 only).
struct RightOperand {
  const bf16_t* bf16 = nullptr;
  const float* f32 = nullptr;
  std::int64_t stride = 0;
  RightLayout layout = RightLayout::kNK;
  const std::int32_t* rows = nullptr;
};

// Scratch of one worker: an expanded block of B and a packed block of A.
struct GemmScratch {
  float* a_block = nullptr;
  float* b_block = nullptr;
};
std::int64_t gemm_scratch_floats(const KernelTable& kernels);
GemmScratch gemm_scratch_at(const KernelTable& kernels, float* base);

// C[m * c_stride + n] += scale * sum over k of A(m, k) B(k, n).
void gemm_accumulate(const KernelTable& kernels, int rows, int columns, int depth, const LeftOperand& a,
                     const RightOperand& b, float* c, std::int64_t c_stride, const GemmScratch& scratch);

}  // namespace kt_expert
