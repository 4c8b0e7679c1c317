// The reference ISA: plain loops, sums in double, libm's exp. Slow and exact; every other ISA is tested against it.
#include <algorithm>
#include <cmath>

#include "gemm/elementwise.h"
#include "gemm/peaks.h"

namespace kt_expert {
namespace {

const float* row_pointer(const LeftRows& a, std::int64_t row) {
  return static_cast<const float*>(a.base) + (a.rows == nullptr ? row : a.rows[row]) * a.stride;
}

void direct_forward(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                    std::int64_t c_stride) {
  for (int n = 0; n < range.row_blocks * kBlockRows; ++n) {
    for (int m = 0; m < rows; ++m) {
      const float* values = row_pointer(a, m);
      double sum = c[m * c_stride + n];
      for (int k = 0; k < range.depth_blocks * kBlockDepth; ++k) {
        const float weight = decode_element(w, range.first_row * kBlockRows + n, range.first_depth * kBlockDepth + k);
        sum += static_cast<double>(values[k]) * weight;
      }
      c[m * c_stride + n] = static_cast<float>(sum);
    }
  }
}

void direct_backward(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                     std::int64_t c_stride) {
  for (int k = 0; k < range.depth_blocks * kBlockDepth; ++k) {
    for (int m = 0; m < rows; ++m) {
      const float* values = row_pointer(a, m);
      double sum = c[m * c_stride + k];
      for (int n = 0; n < range.row_blocks * kBlockRows; ++n) {
        const float weight = decode_element(w, range.first_row * kBlockRows + n, range.first_depth * kBlockDepth + k);
        sum += static_cast<double>(values[n]) * weight;
      }
      c[m * c_stride + k] = static_cast<float>(sum);
    }
  }
}

void expand_f32_nk(const float* source, std::int64_t stride, int columns, int depth, void* panel) {
  float* target = static_cast<float*>(panel);
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < kPanelColumns; ++n) *target++ = n < columns ? source[n * stride + k] : 0.0f;
  }
}

void expand_f32_kn(const float* source, std::int64_t stride, int columns, int depth, void* panel) {
  float* target = static_cast<float*>(panel);
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < kPanelColumns; ++n) *target++ = n < columns ? source[k * stride + n] : 0.0f;
  }
}

void multiply(const LeftRows& a, int rows, int depth, const void* panels, std::int64_t panel_stride, int panel_count,
              float* c, std::int64_t c_stride) {
  for (int column = 0; column < panel_count * kPanelColumns; ++column) {
    const char* first = static_cast<const char*>(panels) + column / kPanelColumns * panel_stride;
    const float* panel = reinterpret_cast<const float*>(first) + column % kPanelColumns;
    for (int m = 0; m < rows; ++m) {
      double sum = c[m * c_stride + column];
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(row_pointer(a, m)[k]) * panel[k * kPanelColumns];
      c[m * c_stride + column] = static_cast<float>(sum);
    }
  }
}

void outer(const OuterRows& left, const OuterRows& right, int depth, int rows, int columns, float* c,
           std::int64_t c_stride) {
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      double sum = c[m * c_stride + n];
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(left.row(k)[m]) * right.row(k)[n];
      c[m * c_stride + n] = static_cast<float>(sum);
    }
  }
}

// Unlike std::fmin, lets NaN through.
double at_most(double value, double limit) { return value > limit ? limit : value; }

double sigmoid(double value) { return 1.0 / (1.0 + std::exp(-value)); }

struct Evaluated {
  double h, d_gate, d_up;
};

Evaluated swiglu(const ActivationSpec& spec, double gate, double up) {
  const bool clamped = has_limit(spec.kind);
  const bool gate_passes = !clamped || gate <= spec.limit;
  const bool up_passes = !clamped || (up >= -spec.limit && up <= spec.limit);
  if (clamped) {
    gate = at_most(gate, spec.limit);
    up = -at_most(-at_most(up, spec.limit), spec.limit);
  }
  if (spec.kind == Activation::kGptOss) up += 1.0;
  const double s = sigmoid(spec.alpha * gate);
  return {gate * s * up, gate_passes ? up * s * (1.0 + spec.alpha * gate * (1.0 - s)) : 0.0,
          up_passes ? gate * s : 0.0};
}

Evaluated gelu_tanh(double gate, double up) {
  const double root = std::sqrt(2.0 / M_PI), cubic = 0.044715;
  const double t = std::tanh(root * (gate + cubic * gate * gate * gate));
  const double slope = 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * root * (1.0 + 3.0 * cubic * gate * gate);
  const double gelu = 0.5 * gate * (1.0 + t);
  return {gelu * up, slope * up, gelu};
}

Evaluated evaluate(const ActivationSpec& spec, double gate, double up) {
  if (spec.kind == Activation::kGeluTanh) return gelu_tanh(gate, up);
  if (spec.kind != Activation::kRelu2) return swiglu(spec, gate, up);
  const double positive = up < 0.0 ? 0.0 : up;
  return {positive * positive, 0.0, 2.0 * positive};
}

void activate(const ActivationSpec& spec, const float* gate, const float* up, float* h, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    h[i] = static_cast<float>(evaluate(spec, has_gate(spec.kind) ? gate[i] : 0.0, up[i]).h);
  }
}

void activate_backward(const ActivationSpec& spec, const float* gate, const float* up, const float* d_h, float* d_gate,
                       float* d_up, std::int64_t count) {
  const bool gated = has_gate(spec.kind);
  for (std::int64_t i = 0; i < count; ++i) {
    const Evaluated value = evaluate(spec, gated ? gate[i] : 0.0, up[i]);
    const double d = d_h[i];
    if (gated) d_gate[i] = static_cast<float>(d * value.d_gate);
    d_up[i] = static_cast<float>(d * value.d_up);
  }
}

struct OneFloat {
  static constexpr int kLanes = 1;
  float v;
  static OneFloat set(float value) { return {value}; }
  static OneFloat load(const float* source) { return {*source}; }
  void store(float* target) const { *target = v; }
  static OneFloat fma(OneFloat a, OneFloat b, OneFloat c) { return {a.v * b.v + c.v}; }
  friend OneFloat operator+(OneFloat a, OneFloat b) { return {a.v + b.v}; }
};

KernelTable make_table() {
  KernelTable table{};
  table.isa = Isa::kScalar;
  table.name = "scalar";
  table.operand = OperandType::kF32;
  table.tile_rows = 1;
  table.tile_panels = 1;
  table.depth_step = 1;
  table.gathers = true;
  for (FormatKernels& format : table.formats) {
    // A panel's slices would round between them; the sums here are in double from end to end.
    format.direct_forward_rows = format.direct_backward_rows = kAllRows;
    format.direct_forward = direct_forward;
    format.direct_backward = direct_backward;
  }
  table.expand_f32_nk = expand_f32_nk;
  table.expand_f32_kn = expand_f32_kn;
  table.multiply = multiply;
  table.outer = outer;
  table.activate = activate;
  table.activate_backward = activate_backward;
  set_float_loops(table);
  table.burn = burn_fma<OneFloat>;
  table.read = read_floats<OneFloat>;
  return table;
}

}  // namespace

const KernelTable& scalar_kernels() {
  static const KernelTable kTable = make_table();
  return kTable;
}

}  // namespace kt_expert
