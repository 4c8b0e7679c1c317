// Optimizer updates over contiguous floats, compiled once per instruction set like elementwise.h. Formulas and their
// order of operations are torch.optim's, so that fp32 moments follow it to rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gemm/kernels.h"
#include "gemm/sums.h"

namespace kt_expert {
namespace {

inline float read_moment(float value) { return value; }
inline float read_moment(bf16_t value) { return bf16_to_float(value); }

// A well-mixed word for an element: two rounds of multiply and shift (the constants are those of xxHash's avalanche).
inline std::uint32_t mixed(std::uint32_t value) {
  value = (value ^ (value >> 15)) * 0x85EBCA77u;
  value = (value ^ (value >> 13)) * 0xC2B2AE3Du;
  return value ^ (value >> 16);
}

// start + weight (end - start), from the nearer end: close to 1 the difference would cancel. torch's lerp does the
// same.
inline float lerp(float start, float end, float weight, float rest) {
  return weight < 0.5f ? start + weight * (end - start) : end - rest * (end - start);
}

// Up with the probability of what is cut off, so that the mean is exact.
inline void write_moment(float value, std::uint32_t, float& target) { target = value; }
inline void write_moment(float value, std::uint32_t random, bf16_t& target) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  target = static_cast<bf16_t>((bits + (random & 0xFFFFu)) >> 16);
}

template <typename Moment>
void loop_adam(const AdamStep& step, const float* gradient, float* parameter, void* exp_avg, void* exp_avg_sq,
               std::uint32_t first, std::int64_t count) {
  Moment* averages = static_cast<Moment*>(exp_avg);
  Moment* squares = static_cast<Moment*>(exp_avg_sq);
  const float decay = step.decoupled ? static_cast<float>(1.0 - step.learning_rate * step.weight_decay) : 1.0f;
  const float l2 = step.decoupled ? 0.0f : static_cast<float>(step.weight_decay);
  const float step_size = static_cast<float>(step.learning_rate / step.bias_correction1);
  const float root_correction = static_cast<float>(1.0 / std::sqrt(step.bias_correction2));  // divisions are few
  const float grad_scale = static_cast<float>(step.grad_scale), eps = static_cast<float>(step.eps);
  const float beta1 = static_cast<float>(step.beta1), rest1 = static_cast<float>(1.0 - step.beta1);
  const float beta2 = static_cast<float>(step.beta2), rest2 = static_cast<float>(1.0 - step.beta2);
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = grad_scale * gradient[i] + l2 * parameter[i];
    const float m = lerp(read_moment(averages[i]), g, rest1, beta1);
    const float v = beta2 * read_moment(squares[i]) + rest2 * g * g;
    const std::uint32_t random =
        std::is_same_v<Moment, float> ? 0u : mixed(step.rounding + first + static_cast<std::uint32_t>(i));
    write_moment(m, random, averages[i]);
    write_moment(v, random >> 16, squares[i]);
    parameter[i] = parameter[i] * decay - step_size * (m / (std::sqrt(v) * root_correction + eps));
  }
}

template <typename Moment>
void loop_sgd(const SgdStep& step, const float* gradient, float* parameter, void* momentum_buffer, std::uint32_t first,
              std::int64_t count) {
  Moment* buffer = static_cast<Moment*>(momentum_buffer);
  const float grad_scale = static_cast<float>(step.grad_scale), l2 = static_cast<float>(step.weight_decay);
  const float momentum = static_cast<float>(step.momentum), rate = static_cast<float>(step.learning_rate);
  if (buffer == nullptr) {
    for (std::int64_t i = 0; i < count; ++i) parameter[i] -= rate * (grad_scale * gradient[i] + l2 * parameter[i]);
    return;
  }
  const float fresh = step.first ? 1.0f : static_cast<float>(1.0 - step.dampening);
  const float by_gradient = step.nesterov ? 1.0f : 0.0f, by_buffer = step.nesterov ? momentum : 1.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = grad_scale * gradient[i] + l2 * parameter[i];
    const float b = momentum * read_moment(buffer[i]) + fresh * g;
    const std::uint32_t random =
        std::is_same_v<Moment, float> ? 0u : mixed(step.rounding + first + static_cast<std::uint32_t>(i));
    write_moment(b, random, buffer[i]);
    parameter[i] -= rate * (by_gradient * g + by_buffer * b);
  }
}

void loop_line_squares(const float* matrix, std::int64_t rows, std::int64_t columns, float* of_rows,
                       float* of_columns) {
  std::fill_n(of_columns, columns, 0.0f);
  for (std::int64_t m = 0; m < rows; ++m) {
    const float* row = matrix + m * columns;
    of_rows[m] = static_cast<float>(sum_squares_of(columns, [&](std::int64_t i) { return row[i]; }));
    for (std::int64_t i = 0; i < columns; ++i) of_columns[i] += row[i] * row[i];
  }
}

// One row of a factored update. The root of a product is the product of roots, so that an element needs neither root
// nor division; NaN where the estimate is.
struct FactoredRow {
  float row, by_root, by_least, least;
  const float* columns;
  const float* column_roots;

  FactoredRow(const FactoredEstimate& estimate, std::int64_t m)
      : row(estimate.rows[m]),
        by_root(estimate.scale * estimate.row_roots[m]),
        by_least(estimate.scale / std::sqrt(estimate.least)),
        least(estimate.least),
        columns(estimate.columns),
        column_roots(estimate.column_roots) {}
  float operator()(const float* gradient, std::int64_t i) const {
    const float by_estimate = by_root * column_roots[i];
    return gradient[i] * (row * columns[i] < least ? by_least : by_estimate);
  }
};

double loop_factored_squares(const FactoredEstimate& estimate, const float* gradient, std::int64_t rows,
                             std::int64_t columns) {
  double total = 0.0;
  for (std::int64_t m = 0; m < rows; ++m, gradient += columns) {
    const FactoredRow row(estimate, m);
    total += sum_squares_of(columns, [&](std::int64_t i) { return row(gradient, i); });
  }
  return total;
}

void loop_factored_apply(const FactoredEstimate& estimate, float factor, const float* gradient, float* parameter,
                         std::int64_t rows, std::int64_t columns) {
  for (std::int64_t m = 0; m < rows; ++m, gradient += columns, parameter += columns) {
    const FactoredRow row(estimate, m);
    for (std::int64_t i = 0; i < columns; ++i) parameter[i] += factor * row(gradient, i);
  }
}

void set_optimizer_loops(KernelTable& table) {
  table.adam[static_cast<int>(MomentType::kF32)] = loop_adam<float>;
  table.adam[static_cast<int>(MomentType::kBf16)] = loop_adam<bf16_t>;
  table.sgd[static_cast<int>(MomentType::kF32)] = loop_sgd<float>;
  table.sgd[static_cast<int>(MomentType::kBf16)] = loop_sgd<bf16_t>;
  table.line_squares = loop_line_squares;
  table.factored_squares = loop_factored_squares;
  table.factored_apply = loop_factored_apply;
}

}  // namespace
}  // namespace kt_expert
