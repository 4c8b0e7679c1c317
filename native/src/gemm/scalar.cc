// The reference rung: plain loops, sums in double, libm's exp. Slow and exact; every other rung is tested against it.
#include <cmath>

#include "gemm/elementwise.h"

namespace kt_expert {
namespace {

constexpr int kRows = 2;
constexpr int kColumns = 4;
constexpr int kMaxDepth = 4096;

void expand_nk(const bf16_t* source, std::int64_t stride, int columns, int depth, float* panel) {
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < kColumns; ++n) {
      panel[k * kColumns + n] = n < columns ? bf16_to_float(source[n * stride + k]) : 0.0f;
    }
  }
}

void expand_f32(const float* source, std::int64_t stride, int columns, int depth, float* panel) {
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < kColumns; ++n) panel[k * kColumns + n] = n < columns ? source[n * stride + k] : 0.0f;
  }
}

void expand_kn(const bf16_t* source, std::int64_t stride, int columns, int depth, float* panel) {
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < kColumns; ++n) {
      panel[k * kColumns + n] = n < columns ? bf16_to_float(source[k * stride + n]) : 0.0f;
    }
  }
}

void pack(const float* const* rows, int count, float scale, int depth, float* panel) {
  for (int k = 0; k < depth; ++k) {
    for (int m = 0; m < kRows; ++m) panel[k * kRows + m] = m < count ? scale * rows[m][k] : 0.0f;
  }
}

void multiply(int depth, const float* a_panel, const float* b_panel, float* c, std::int64_t c_stride, int rows,
              int columns) {
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      double sum = c[m * c_stride + n];
      for (int k = 0; k < depth; ++k) {
        sum += static_cast<double>(a_panel[k * kRows + m]) * b_panel[k * kColumns + n];
      }
      c[m * c_stride + n] = static_cast<float>(sum);
    }
  }
}

// Unlike std::fmin, lets NaN through.
double at_most(double value, double limit) { return value > limit ? limit : value; }

double sigmoid(double value) { return 1.0 / (1.0 + std::exp(-value)); }

void activate(const ActivationSpec& spec, const float* gate, const float* up, float* h, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    double g = gate[i];
    double u = up[i];
    if (spec.kind == Activation::kGptOss) {
      g = at_most(g, spec.limit);
      u = -at_most(-at_most(u, spec.limit), spec.limit) + 1.0;
    }
    h[i] = static_cast<float>(g * sigmoid(spec.alpha * g) * u);
  }
}

void activate_backward(const ActivationSpec& spec, const float* gate, const float* up, const float* d_h, float* d_gate,
                       float* d_up, std::int64_t count) {
  const bool clamped = spec.kind == Activation::kGptOss;
  for (std::int64_t i = 0; i < count; ++i) {
    double g = gate[i];
    double u = up[i];
    const bool gate_passes = !clamped || g <= spec.limit;
    const bool up_passes = !clamped || (u >= -spec.limit && u <= spec.limit);
    if (clamped) {
      g = at_most(g, spec.limit);
      u = -at_most(-at_most(u, spec.limit), spec.limit) + 1.0;
    }
    const double s = sigmoid(spec.alpha * g);
    const double d = d_h[i];
    d_gate[i] = gate_passes ? static_cast<float>(d * u * s * (1.0 + spec.alpha * g * (1.0 - s))) : 0.0f;
    d_up[i] = up_passes ? static_cast<float>(d * g * s) : 0.0f;
  }
}

}  // namespace

const KernelTable& scalar_kernels() {
  static constexpr KernelTable kTable{
      Isa::kScalar,     "scalar_2x4",     kRows,      kColumns,        kMaxDepth, expand_nk,
      expand_kn,        expand_f32,       pack,       multiply,        activate,  activate_backward,
      loop_bf16_to_f32, loop_f32_to_bf16, loop_scale, loop_add_scaled, loop_dot,  loop_sum_squares,
      loop_adamw};
  return kTable;
}

}  // namespace kt_expert
