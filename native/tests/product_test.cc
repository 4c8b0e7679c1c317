// Every ISA's products against the same double-precision reference, over every weight format and over shapes that fill
// tiles and shapes that do not.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "gemm/gemm.h"
#include "isas.h"

namespace kt_expert {
namespace {

struct Shape {
  int rows, outputs, depth;  // of A, of W, of both
};
// Rows around every tile height; outputs and depths that end inside a block.
const Shape kShapes[] = {{1, 1, 1},    {2, 16, 32},   {3, 17, 33},   {4, 33, 31},   {5, 15, 7},
                         {6, 48, 64},  {7, 17, 161},  {8, 64, 96},   {12, 130, 40}, {13, 33, 65},
                         {16, 32, 32}, {17, 95, 129}, {31, 48, 100}, {33, 70, 45},  {49, 50, 130}};

struct Operands {
  std::vector<std::uint8_t> bytes;
  std::vector<float> values;  // [rows, stride], what the ISA sees
  std::int64_t stride = 0;
  LeftRows left;
};

// Rows of random operands with zeros past `width`, as the kernels are promised.
Operands make_operands(const KernelTable& kernels, Values& values, int rows, int width) {
  Operands made;
  made.stride = (width + kDepthAlign - 1) / kDepthAlign * kDepthAlign + kDepthAlign;
  std::vector<float> filled(static_cast<std::size_t>((rows + kRowSlack) * made.stride), 0.0f);
  const std::vector<float> random = values.floats(static_cast<std::int64_t>(rows) * width);
  for (int m = 0; m < rows; ++m) {
    for (int k = 0; k < width; ++k) {
      filled[static_cast<std::size_t>(m * made.stride + k)] =
          operand_value(kernels, random[static_cast<std::size_t>(m * width + k)]);
    }
  }
  made.bytes = operand_rows(kernels, filled);
  made.values = std::move(filled);
  made.left = {made.bytes.data(), made.stride, nullptr};
  return made;
}

struct Weights {
  PackedTensor tensor;
  std::vector<float> dense;  // [outputs, depth] as the ISA sees them
};

Weights make_weights(const KernelTable& kernels, Values& values, WeightFormat format, int outputs, int depth) {
  Weights made;
  made.tensor = PackedTensor(1, {format, outputs, depth});
  const std::vector<bf16_t> source = bf16_bits(values.floats(static_cast<std::int64_t>(outputs) * depth, 0.1f));
  made.tensor.encode(0, {source.data(), depth, 1});
  for (int n = 0; n < outputs; ++n) {
    for (int k = 0; k < depth; ++k) {
      made.dense.push_back(operand_value(kernels, decode_element(made.tensor.matrix(0), n, k)));
    }
  }
  return made;
}

struct Block {
  std::int64_t stride;
  std::vector<float> values;

  Block(Values& random, int rows, int columns)
      : stride((columns + 63) / 32 * 32), values(random.floats((rows + kRowSlack) * stride)) {}
  float at(int m, int n) const { return values[static_cast<std::size_t>(m * stride + n)]; }
};

template <typename Term>
void check_close(const Block& before, const Block& after, int rows, int columns, int depth, const Term& term) {
  bool close = true;
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      double sum = before.at(m, n), absolute = std::fabs(sum);
      for (int k = 0; k < depth; ++k) {
        const double product = term(m, n, k);
        sum += product;
        absolute += std::fabs(product);
      }
      close = close && std::fabs(after.at(m, n) - sum) <= chain_tolerance(depth, absolute);
    }
  }
  CHECK(close);
}

struct Scratch {
  std::vector<std::uint8_t> bytes;
  PanelScratch panels;
  explicit Scratch(const KernelTable& kernels)
      : bytes(static_cast<std::size_t>(panel_scratch_bytes(kernels))), panels{bytes.data()} {}
};

int blocks(int extent, int unit) { return (extent + unit - 1) / unit; }

template <typename Body>
void for_each_kernel(const Body& body) {
  for_each_rung([&](const KernelTable& kernels) {
    for (WeightFormat format : all_weight_formats()) {
      CAPTURE(std::string(weight_format_name(format)));
      body(kernels, format);
      record_kernel(kernels.isa, format);
    }
  });
}

// y = x W^T or dx = dy W, as the passes ask for them.
struct Direction {
  bool forward;

  int reduced(const Shape& shape) const { return forward ? shape.depth : shape.outputs; }
  int columns(const Shape& shape) const { return forward ? shape.outputs : shape.depth; }
  int units(const Shape& shape) const { return blocks(columns(shape), forward ? kBlockRows : kBlockDepth); }
  // Element (k, n) of the right operand, for weights [outputs, depth].
  std::size_t at(const Shape& shape, int k, int n) const {
    return static_cast<std::size_t>(forward ? n * shape.depth + k : k * shape.depth + n);
  }
  void multiply(const KernelTable& kernels, const LeftRows& a, int rows, const Weights& w, const Shape& shape, Block& c,
                const Scratch& scratch) const {
    (forward ? multiply_forward : multiply_backward)(kernels, a, rows, w.tensor.matrix(0), 0, units(shape),
                                                     c.values.data(), c.stride, scratch.panels);
  }
};
const Direction kDirections[] = {{true}, {false}};

TEST_CASE("products of every format and shape, forward and backward") {
  for_each_kernel([](const KernelTable& kernels, WeightFormat format) {
    Values values;
    Scratch scratch(kernels);
    for (const Direction& direction : kDirections) {
      for (const Shape& shape : kShapes) {
        CAPTURE(direction.forward);
        CAPTURE(shape.rows);
        CAPTURE(shape.outputs);
        CAPTURE(shape.depth);
        const Operands a = make_operands(kernels, values, shape.rows, direction.reduced(shape));
        const Weights w = make_weights(kernels, values, format, shape.outputs, shape.depth);
        Block c(values, shape.rows, direction.units(shape) * kBlockDepth);
        const Block before = c;
        direction.multiply(kernels, a.left, shape.rows, w, shape, c, scratch);
        check_close(before, c, shape.rows, direction.columns(shape), direction.reduced(shape),
                    [&](int m, int n, int k) {
                      return static_cast<double>(a.values[static_cast<std::size_t>(m * a.stride + k)]) *
                             w.dense[direction.at(shape, k, n)];
                    });
      }
    }
  });
}

// A row alone takes the direct path and rows together take panels: both must give the same bits, or a result would
// depend on the tokens that share the batch.
TEST_CASE("a row's bits do not depend on the rows beside it") {
  for_each_kernel([](const KernelTable& kernels, WeightFormat format) {
    Values values;
    Scratch scratch(kernels);
    const Shape shape{37, 70, 300};
    const Weights w = make_weights(kernels, values, format, shape.outputs, shape.depth);
    for (const Direction& direction : kDirections) {
      CAPTURE(direction.forward);
      const Operands a = make_operands(kernels, values, shape.rows, direction.reduced(shape));
      Block together(values, shape.rows, direction.units(shape) * kBlockDepth);
      std::fill(together.values.begin(), together.values.end(), 0.0f);
      Block alone = together;
      direction.multiply(kernels, a.left, shape.rows, w, shape, together, scratch);
      bool same = true;
      for (int first = 0, count = 1; first < shape.rows; first += count, count = count % 11 + 1) {
        const int rows = std::min(count, shape.rows - first);
        std::fill(alone.values.begin(), alone.values.end(), 0.0f);
        LeftRows part = a.left;
        part.base = a.bytes.data() + first * a.stride * operand_bytes(kernels.operand);
        direction.multiply(kernels, part, rows, w, shape, alone, scratch);
        for (int m = 0; m < rows; ++m) {
          for (int n = 0; n < direction.columns(shape); ++n) {
            same = same && alone.at(m, n) == together.at(first + m, n);
          }
        }
      }
      CHECK(same);
    }
  });
}

TEST_CASE("products with fp32 matrices in both layouts") {
  for_each_rung([](const KernelTable& kernels) {
    Values values;
    Scratch scratch(kernels);
    for (const Shape& shape : kShapes) {
      for (const RightLayout layout : {RightLayout::kNK, RightLayout::kKN}) {
        CAPTURE(shape.rows);
        CAPTURE(shape.outputs);
        CAPTURE(shape.depth);
        const Operands a = make_operands(kernels, values, shape.rows, shape.depth);
        const bool nk = layout == RightLayout::kNK;
        const int lines = nk ? shape.outputs : shape.depth, spare = 3;
        const std::int64_t stride = (nk ? shape.depth : shape.outputs) + spare;
        const std::vector<float> b = values.floats(lines * stride);
        Block c(values, shape.rows, shape.outputs);
        const Block before = c;
        multiply_f32(kernels, a.left, shape.rows, {b.data(), stride, layout}, shape.outputs, shape.depth,
                     c.values.data(), c.stride, scratch.panels);
        check_close(before, c, shape.rows, shape.outputs, shape.depth, [&](int m, int n, int k) {
          const float right = b[static_cast<std::size_t>(nk ? n * stride + k : k * stride + n)];
          return static_cast<double>(a.values[static_cast<std::size_t>(m * a.stride + k)]) *
                 operand_value(kernels, right);
        });
      }
    }
  });
}

TEST_CASE("a row's product with an fp32 matrix has the same bits whatever rows are beside it") {
  for_each_rung([](const KernelTable& kernels) {
    Values values;
    Scratch scratch(kernels);
    const int rows = 9, depth = 53, outputs = 2 * kPanelColumns + 5;
    const Operands a = make_operands(kernels, values, rows, depth);
    const Block before(values, rows, outputs);
    for (const RightLayout layout : {RightLayout::kNK, RightLayout::kKN}) {
      const std::int64_t stride = layout == RightLayout::kNK ? depth : outputs;
      const std::vector<float> b = values.floats(std::int64_t{outputs} * depth);
      Block together = before;
      multiply_f32(kernels, a.left, rows, {b.data(), stride, layout}, outputs, depth, together.values.data(),
                   together.stride, scratch.panels);
      for (int count = 1; count < rows; ++count) {
        Block fewer = before;  // rows past `count` may be written too
        multiply_f32(kernels, a.left, count, {b.data(), stride, layout}, outputs, depth, fewer.values.data(),
                     fewer.stride, scratch.panels);
        for (int m = 0; m < count; ++m) {
          const float* line = together.values.data() + m * together.stride;
          CHECK(std::equal(line, line + outputs, fewer.values.data() + m * fewer.stride));
        }
      }
    }
  });
}

TEST_CASE("rows are gathered by index where the ISA says so") {
  for_each_rung([](const KernelTable& kernels) {
    if (!kernels.gathers) return;
    Values values;
    Scratch scratch(kernels);
    const int rows = 21, depth = 70, outputs = 40;
    const Operands a = make_operands(kernels, values, rows, depth);
    const Weights w = make_weights(kernels, values, WeightFormat::kBf16, outputs, depth);
    std::vector<std::int32_t> order;
    for (int m = 0; m < rows; ++m) order.push_back((m * 8 + 3) % rows);
    for (const int count : {1, 3, rows}) {
      Block c(values, rows, outputs);
      const Block before = c;
      LeftRows gathered = a.left;
      gathered.rows = order.data();
      multiply_forward(kernels, gathered, count, w.tensor.matrix(0), 0, blocks(outputs, kBlockRows), c.values.data(),
                       c.stride, scratch.panels);
      check_close(before, c, count, outputs, depth, [&](int m, int n, int k) {
        const std::int64_t row = order[static_cast<std::size_t>(m)];
        return static_cast<double>(a.values[static_cast<std::size_t>(row * a.stride + k)]) *
               w.dense[static_cast<std::size_t>(n * depth + k)];
      });
    }
  });
}

TEST_CASE("sums over rows, of any width, and nothing written beside them") {
  for_each_rung([](const KernelTable& kernels) {
    Values values;
    for (const Shape& shape : {Shape{1, 1, 1}, Shape{6, 16, 9}, Shape{7, 8, 5}, Shape{16, 37, 12}, Shape{33, 3, 40}}) {
      for (const bool gathered : {false, true}) {
        CAPTURE(shape.rows);
        CAPTURE(shape.outputs);
        const int spare = 5;
        const std::int64_t left_stride = shape.rows + spare, right_stride = shape.outputs + spare;
        const std::vector<float> left = values.floats(shape.depth * left_stride);
        const std::vector<float> right = values.floats(shape.depth * right_stride);
        std::vector<std::int32_t> order;
        for (int k = 0; k < shape.depth; ++k) order.push_back((k * 7 + 2) % shape.depth);
        const std::int32_t* rows = gathered ? order.data() : nullptr;
        const std::int64_t c_stride = shape.outputs + 2;
        std::vector<float> c = values.floats(shape.rows * c_stride);
        const std::vector<float> before = c;
        kernels.outer({left.data(), left_stride, nullptr}, {right.data(), right_stride, rows}, shape.depth, shape.rows,
                      shape.outputs, c.data(), c_stride);
        bool close = true, outside_untouched = true;
        for (int m = 0; m < shape.rows; ++m) {
          for (int n = 0; n < c_stride; ++n) {
            const std::size_t at = static_cast<std::size_t>(m * c_stride + n);
            if (n >= shape.outputs) {
              outside_untouched = outside_untouched && c[at] == before[at];
              continue;
            }
            double sum = before[at], absolute = std::fabs(sum);
            for (int k = 0; k < shape.depth; ++k) {
              const std::int64_t from = gathered ? order[static_cast<std::size_t>(k)] : k;
              const double term = static_cast<double>(left[static_cast<std::size_t>(k * left_stride + m)]) *
                                  right[static_cast<std::size_t>(from * right_stride + n)];
              sum += term;
              absolute += std::fabs(term);
            }
            close = close && std::fabs(c[at] - sum) <= chain_tolerance(shape.depth, absolute);
          }
        }
        CHECK(close);
        CHECK(outside_untouched);
      }
    }
  });
}

}  // namespace
}  // namespace kt_expert
