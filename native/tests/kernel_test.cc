// Every rung of the registry against the same double-precision reference, over shapes that fill tiles and shapes that
// do not. Tolerances come from the norms of what is summed.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemm/kernels.h"

namespace kt_expert {
namespace {

std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> found;
#define KT_KERNEL(enumerator, table) \
  if (isa_supported(Isa::enumerator)) found.push_back(&table());
#include "gemm/registry.inc"
#undef KT_KERNEL
  return found;
}

struct Values {
  std::mt19937 random{7};
  std::vector<float> floats(std::size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
  }
  std::vector<bf16_t> bf16(std::size_t count) {
    std::vector<bf16_t> bits;
    for (float value : floats(count)) bits.push_back(float_to_bf16(value));
    return bits;
  }
};

struct Shape {
  int rows, columns, depth;
};
const Shape kShapes[] = {{1, 1, 1},     {6, 16, 8},    {7, 17, 9},     {5, 15, 7},    {12, 32, 384},
                         {13, 33, 385}, {49, 130, 50}, {48, 128, 400}, {3, 129, 777}, {96, 16, 2}};

// |sum of products| error of a chain of fp32 fused multiply-adds: depth * eps * sum |a b|.
double tolerance(int depth, double absolute_sum) {
  return (depth + 2) * std::numeric_limits<float>::epsilon() * absolute_sum + 1e-30;
}

struct Product {
  LeftOperand a;
  RightOperand b;
  std::vector<float> a_values, b_f32;
  std::vector<bf16_t> b_bf16;
  std::vector<std::int32_t> a_rows, b_rows;

  double left(int m, int k) const {
    const std::int64_t row = a.transposed ? k : m, column = a.transposed ? m : k;
    const std::int64_t at = a.rows == nullptr ? row : a.rows[row];
    return static_cast<double>(a.scale) * a.base[at * a.stride + column];
  }
  double right(int k, int n) const {
    if (b.layout == RightLayout::kNK) {
      const std::int64_t at = static_cast<std::int64_t>(n) * b.stride + k;
      return b.bf16 != nullptr ? bf16_to_float(b.bf16[at]) : b.f32[at];
    }
    const std::int64_t at = static_cast<std::int64_t>(b.rows == nullptr ? k : b.rows[k]) * b.stride + n;
    return b.bf16 != nullptr ? bf16_to_float(b.bf16[at]) : b.f32[at];
  }
};

Product make_product(Values& values, Shape shape, bool transposed, bool gathered, bool bf16, RightLayout layout) {
  Product product;
  const int a_lines = transposed ? shape.depth : shape.rows, a_width = transposed ? shape.rows : shape.depth;
  const int b_lines = layout == RightLayout::kNK ? shape.columns : shape.depth;
  const int b_width = layout == RightLayout::kNK ? shape.depth : shape.columns;
  const int spare = 3;  // strides wider than the matrix
  product.a_values = values.floats(static_cast<std::size_t>(a_lines * (a_width + spare)));
  product.a.stride = a_width + spare;
  product.a.transposed = transposed;
  product.a.scale = 0.5f;
  product.b.stride = b_width + spare;
  product.b.layout = layout;
  const std::size_t b_size = static_cast<std::size_t>(b_lines * (b_width + spare));
  if (bf16) {
    product.b_bf16 = values.bf16(b_size);
  } else {
    product.b_f32 = values.floats(b_size);
  }
  if (gathered) {
    for (int i = 0; i < a_lines; ++i) product.a_rows.push_back((i * 7 + 3) % a_lines);
    for (int i = 0; i < b_lines; ++i) product.b_rows.push_back((i * 5 + 1) % b_lines);
  }
  return product;
}

void point(Product& product) {
  product.a.base = product.a_values.data();
  product.b.bf16 = product.b_bf16.empty() ? nullptr : product.b_bf16.data();
  product.b.f32 = product.b_f32.empty() ? nullptr : product.b_f32.data();
  if (!product.a_rows.empty()) product.a.rows = product.a_rows.data();
  if (!product.b_rows.empty() && product.b.layout == RightLayout::kKN && product.b.f32 != nullptr) {
    product.b.rows = product.b_rows.data();
  }
}

void check_product(const KernelTable& kernels, Values& values, Shape shape, Product& product) {
  point(product);
  std::vector<float> scratch(static_cast<std::size_t>(gemm_scratch_floats(kernels)));
  const std::int64_t stride = shape.columns + 2;
  std::vector<float> c = values.floats(static_cast<std::size_t>(shape.rows * stride));
  const std::vector<float> before = c;
  gemm_accumulate(kernels, shape.rows, shape.columns, shape.depth, product.a, product.b, c.data(), stride,
                  gemm_scratch_at(kernels, scratch.data()));
  bool close = true, outside_untouched = true;
  for (int m = 0; m < shape.rows; ++m) {
    for (int n = 0; n < stride; ++n) {
      const std::size_t at = static_cast<std::size_t>(m * stride + n);
      if (n >= shape.columns) {
        outside_untouched = outside_untouched && c[at] == before[at];
        continue;
      }
      double sum = before[at], absolute = std::fabs(sum);
      for (int k = 0; k < shape.depth; ++k) {
        const double term = product.left(m, k) * product.right(k, n);
        sum += term;
        absolute += std::fabs(term);
      }
      close = close && std::fabs(c[at] - sum) <= tolerance(shape.depth, absolute);
    }
  }
  CHECK(close);
  CHECK(outside_untouched);
}

TEST_CASE("every kernel multiplies every layout and shape") {
  for (const KernelTable* kernels : tables()) {
    CAPTURE(std::string(kernels->name));
    Values values;
    for (const Shape& shape : kShapes) {
      CAPTURE(shape.rows);
      CAPTURE(shape.columns);
      CAPTURE(shape.depth);
      for (int variant = 0; variant < 16; ++variant) {
        CAPTURE(variant);
        const RightLayout layout = (variant & 8) != 0 ? RightLayout::kKN : RightLayout::kNK;
        Product product =
            make_product(values, shape, (variant & 1) != 0, (variant & 2) != 0, (variant & 4) != 0, layout);
        check_product(*kernels, values, shape, product);
      }
    }
  }
}

TEST_CASE("a row's bits do not depend on the rows beside it") {
  for (const KernelTable* kernels : tables()) {
    CAPTURE(std::string(kernels->name));
    Values values;
    const Shape shape{53, 40, 500};
    Product product = make_product(values, shape, false, false, true, RightLayout::kNK);
    point(product);
    std::vector<float> scratch(static_cast<std::size_t>(gemm_scratch_floats(*kernels)));
    const GemmScratch panels = gemm_scratch_at(*kernels, scratch.data());
    std::vector<float> together(static_cast<std::size_t>(shape.rows * shape.columns), 0.0f), alone = together;
    gemm_accumulate(*kernels, shape.rows, shape.columns, shape.depth, product.a, product.b, together.data(),
                    shape.columns, panels);
    for (int m = 0; m < shape.rows; ++m) {
      LeftOperand row = product.a;
      row.base += m * row.stride;
      gemm_accumulate(*kernels, 1, shape.columns, shape.depth, row, product.b, alone.data() + m * shape.columns,
                      shape.columns, panels);
    }
    CHECK(together == alone);
  }
}

double reference_h(const ActivationSpec& spec, double gate, double up) {
  if (spec.kind == Activation::kGptOss) {
    gate = std::fmin(gate, spec.limit);
    up = std::fmax(std::fmin(up, spec.limit), -spec.limit) + 1.0;
  }
  return gate / (1.0 + std::exp(-spec.alpha * gate)) * up;
}

TEST_CASE("activations and their derivatives") {
  const ActivationSpec specs[] = {{Activation::kSilu, 1.0f, 0.0f}, {Activation::kGptOss, 1.702f, 1.5f}};
  for (const KernelTable* kernels : tables()) {
    CAPTURE(std::string(kernels->name));
    for (const ActivationSpec& spec : specs) {
      for (std::size_t count : {1u, 7u, 8u, 9u, 64u, 101u}) {
        Values values;
        std::vector<float> gate = values.floats(count), up = values.floats(count), d_h = values.floats(count);
        if (count > 8) {  // far tails, where a careless exp overflows
          gate[0] = -200.0f;
          gate[1] = 200.0f;
          gate[2] = -88.0f;
        }
        std::vector<float> h(count), d_gate(count), d_up(count);
        kernels->activate(spec, gate.data(), up.data(), h.data(), static_cast<std::int64_t>(count));
        kernels->activate_backward(spec, gate.data(), up.data(), d_h.data(), d_gate.data(), d_up.data(),
                                   static_cast<std::int64_t>(count));
        for (std::size_t i = 0; i < count; ++i) {
          const double step = 1e-5;
          CHECK(h[i] == doctest::Approx(reference_h(spec, gate[i], up[i])).epsilon(1e-6).scale(1e-6));
          const bool at_edge = spec.kind == Activation::kGptOss && (std::fabs(std::fabs(up[i]) - spec.limit) < 1e-3 ||
                                                                    std::fabs(gate[i] - spec.limit) < 1e-3);
          if (at_edge) continue;
          const double slope_gate =
              (reference_h(spec, gate[i] + step, up[i]) - reference_h(spec, gate[i] - step, up[i])) / (2 * step);
          const double slope_up =
              (reference_h(spec, gate[i], up[i] + step) - reference_h(spec, gate[i], up[i] - step)) / (2 * step);
          CHECK(d_gate[i] == doctest::Approx(d_h[i] * slope_gate).epsilon(1e-4).scale(1e-3));
          CHECK(d_up[i] == doctest::Approx(d_h[i] * slope_up).epsilon(1e-4).scale(1e-3));
        }
      }
    }
  }
}

TEST_CASE("NaN passes through the clamps") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const ActivationSpec spec{Activation::kGptOss, 1.702f, 7.0f};
  for (const KernelTable* kernels : tables()) {
    CAPTURE(std::string(kernels->name));
    const float gate[] = {nan, 1.0f}, up[] = {1.0f, nan};
    float h[2];
    kernels->activate(spec, gate, up, h, 2);
    CHECK(std::isnan(h[0]));
    CHECK(std::isnan(h[1]));
  }
}

TEST_CASE("conversions round to nearest even and keep NaN") {
  const float special[] = {0.0f,
                           -0.0f,
                           1.0f,
                           1.00390625f,
                           1.01171875f,
                           3.4e38f,
                           1e-40f,
                           std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN()};
  for (const KernelTable* kernels : tables()) {
    CAPTURE(std::string(kernels->name));
    Values values;
    std::vector<float> source = values.floats(77);
    source.insert(source.end(), std::begin(special), std::end(special));
    std::vector<bf16_t> bits(source.size());
    std::vector<float> back(source.size());
    kernels->f32_to_bf16(source.data(), bits.data(), static_cast<std::int64_t>(source.size()));
    kernels->bf16_to_f32(bits.data(), back.data(), static_cast<std::int64_t>(source.size()));
    for (std::size_t i = 0; i < source.size(); ++i) {
      if (std::isnan(source[i])) {
        CHECK(std::isnan(back[i]));
      } else {
        CHECK(bits[i] == float_to_bf16(source[i]));
        CHECK(back[i] == bf16_to_float(bits[i]));
      }
    }
  }
}

TEST_CASE("the scalar rung is always there and a missing rung is an error") {
  CHECK(kernels_for(Isa::kScalar).mr > 0);
  CHECK_THROWS_WITH_AS(choose_isa("sse9"), doctest::Contains("choose one of: scalar, avx2"), std::runtime_error);
}

}  // namespace
}  // namespace kt_expert
