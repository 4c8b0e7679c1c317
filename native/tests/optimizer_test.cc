// One update of every optimizer on every ISA against double precision.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "isas.h"

namespace kt_expert {
namespace {

const std::int64_t kCounts[] = {1, 7, 8, 9, 16, 31, 128, 1000};
constexpr double kRounding = 2e-6;       // of a handful of fp32 operations, relative to the values' size
constexpr double kBf16Step = 1.0 / 128;  // bf16 rounds up or down, not to nearest

bool close(double got, double expected, double relative) {
  return std::fabs(got - expected) <= relative * (1.0 + std::fabs(expected));
}

struct Moments {
  std::vector<float> values;
  std::vector<bf16_t> bits;

  explicit Moments(const std::vector<float>& from) : values(from), bits(bf16_bits(from)) {}
  void* of(MomentType type) { return type == MomentType::kF32 ? static_cast<void*>(values.data()) : bits.data(); }
  double at(MomentType type, std::size_t i) const {
    return type == MomentType::kF32 ? values[i] : bf16_to_float(bits[i]);
  }
};

std::vector<float> magnitudes(Values& values, std::int64_t count) {
  std::vector<float> made = values.bf16_floats(count);
  for (float& value : made) value = std::fabs(value);
  return made;
}

template <typename Body>
void for_each_case(const Body& body) {
  for_each_rung([&](const KernelTable& kernels) {
    for (const MomentType type : {MomentType::kF32, MomentType::kBf16}) {
      for (const std::int64_t count : kCounts) {
        CAPTURE(static_cast<int>(type));
        CAPTURE(count);
        body(kernels, type, count);
      }
    }
  });
}

TEST_CASE("adam and adamw") {
  for_each_case([](const KernelTable& kernels, MomentType type, std::int64_t count) {
    for (const bool decoupled : {false, true}) {
      Values values;
      const AdamStep step{3e-3, 0.9, 0.98, 1e-8, 0.1, 0.25, 0.271, 0.0588, decoupled, 77};
      const std::vector<float> gradient = values.floats(count), before = values.floats(count);
      const std::vector<float> average = values.bf16_floats(count), square = magnitudes(values, count);
      std::vector<float> parameter = before;
      Moments averages(average), squares(square);
      const double moments = type == MomentType::kF32 ? kRounding : kBf16Step;
      kernels.adam[static_cast<int>(type)](step, gradient.data(), parameter.data(), averages.of(type), squares.of(type),
                                           3, count);
      bool right = true;
      for (std::size_t i = 0; i < parameter.size(); ++i) {
        const double g = 0.25 * gradient[i] + (decoupled ? 0.0 : 0.1 * before[i]);
        const double m = 0.9 * average[i] + 0.1 * g, v = 0.98 * square[i] + 0.02 * g * g;
        const double decayed = decoupled ? before[i] * (1.0 - 3e-4) : before[i];
        const double expected = decayed - 3e-3 / 0.271 * m / (std::sqrt(v) / std::sqrt(0.0588) + 1e-8);
        right = right && close(parameter[i], expected, kRounding) && close(averages.at(type, i), m, moments) &&
                close(squares.at(type, i), v, moments);
      }
      CHECK(right);
    }
  });
}

TEST_CASE("sgd with and without momentum") {
  for_each_case([](const KernelTable& kernels, MomentType type, std::int64_t count) {
    for (const double momentum : {0.0, 0.9}) {
      for (const bool nesterov : {false, true}) {
        Values values;
        const SgdStep step{1e-2, momentum, 0.3, 0.01, 0.5, nesterov, false, 9};
        const std::vector<float> gradient = values.floats(count), before = values.floats(count);
        const std::vector<float> past = values.bf16_floats(count);
        std::vector<float> parameter = before;
        Moments buffer(past);
        kernels.sgd[static_cast<int>(type)](step, gradient.data(), parameter.data(),
                                            momentum == 0.0 ? nullptr : buffer.of(type), 0, count);
        bool right = true;
        for (std::size_t i = 0; i < parameter.size(); ++i) {
          const double g = 0.5 * gradient[i] + 0.01 * before[i], b = momentum * past[i] + 0.7 * g;
          const double direction = momentum == 0.0 ? g : nesterov ? g + momentum * b : b;
          right = right && close(parameter[i], before[i] - 1e-2 * direction, kRounding);
          if (momentum != 0.0) {
            right = right && close(buffer.at(type, i), b, type == MomentType::kF32 ? kRounding : kBf16Step);
          }
        }
        CHECK(right);
      }
    }
  });
}

TEST_CASE("adafactor's sums and updates") {
  struct Shape {
    std::int64_t rows, columns;
  };
  for_each_rung([](const KernelTable& kernels) {
    for (const Shape& shape : {Shape{1, 1}, Shape{5, 3}, Shape{9, 16}, Shape{3, 130}, Shape{40, 33}, Shape{2, 700}}) {
      CAPTURE(shape.rows);
      CAPTURE(shape.columns);
      Values values;
      const std::size_t rows = static_cast<std::size_t>(shape.rows), columns = static_cast<std::size_t>(shape.columns);
      const std::vector<float> gradient = values.floats(shape.rows * shape.columns);
      std::vector<float> of_rows(rows), of_columns(columns), row_roots(rows), column_roots(columns);
      kernels.line_squares(gradient.data(), shape.rows, shape.columns, of_rows.data(), of_columns.data());
      std::vector<double> row_sums(rows), column_sums(columns);
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        row_sums[i / columns] += static_cast<double>(gradient[i]) * gradient[i];
        column_sums[i % columns] += static_cast<double>(gradient[i]) * gradient[i];
      }
      const auto near = [](float got, double expected) { return close(got, expected, kRounding); };
      CHECK(std::equal(of_rows.begin(), of_rows.end(), row_sums.begin(), near));
      CHECK(std::equal(of_columns.begin(), of_columns.end(), column_sums.begin(), near));

      const auto root = [](float value) { return 1.0f / std::sqrt(value); };
      std::transform(of_rows.begin(), of_rows.end(), row_roots.begin(), root);
      std::transform(of_columns.begin(), of_columns.end(), column_roots.begin(), root);
      // One of the products: about half of the estimates lie below it.
      const float least = of_rows[rows / 2] * of_columns[columns / 2];
      const FactoredEstimate estimate{
          of_rows.data(), of_columns.data(), row_roots.data(), column_roots.data(), least, 0.5f};
      const std::vector<float> before = values.floats(shape.rows * shape.columns);
      std::vector<float> parameter = before;
      const double squares = kernels.factored_squares(estimate, gradient.data(), shape.rows, shape.columns);
      // So large that the parameter itself is little beside the update.
      const float factor = -100.0f * std::sqrt(least);
      kernels.factored_apply(estimate, factor, gradient.data(), parameter.data(), shape.rows, shape.columns);
      double expected_squares = 0.0;
      bool right = true;
      int below = 0;
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        const double product = static_cast<double>(of_rows[i / columns]) * of_columns[i % columns];
        below += product < least ? 1 : 0;
        const double update = 0.5 * gradient[i] / std::sqrt(std::max(product, static_cast<double>(least)));
        expected_squares += update * update;
        right = right && close(parameter[i], before[i] + factor * update, kRounding);
      }
      CHECK(right);
      CHECK((gradient.size() < 4 || (below > 0 && below < static_cast<int>(gradient.size()))));
      CHECK(std::fabs(squares - expected_squares) <= kRounding * expected_squares);
    }
  });
}

TEST_CASE("sums of squares of any length") {
  for_each_rung([](const KernelTable& kernels) {
    Values values;
    for (const std::int64_t count : kCounts) {
      const std::vector<float> numbers = values.floats(count);
      double expected = 0.0;
      for (const float value : numbers) expected += static_cast<double>(value) * value;
      CHECK(std::fabs(kernels.sum_squares(numbers.data(), count) - expected) <= kRounding * expected);
    }
  });
}

}  // namespace
}  // namespace kt_expert
