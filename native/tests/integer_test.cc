// Integer products: sums exact, so only the final scaling rounds.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

#include "isas.h"

namespace kt_expert {
namespace {

struct Shape {
  int rows, outputs, depth;
};
const Shape kShapes[] = {{1, 16, 32},   {3, 33, 65},  {8, 48, 64},  {9, 16, 31},
                         {17, 80, 129}, {33, 64, 96}, {70, 32, 200}};

template <typename Body>
void for_each_integer_rung(const Body& body) {
  for_each_rung([&](const KernelTable& kernels) {
    if (kernels.integer != nullptr) body(kernels, *kernels.integer);
  });
}

TEST_CASE("rows are quantised to the nearest of 255 steps") {
  for_each_integer_rung([](const KernelTable&, const IntegerKernels& integer) {
    Values values;
    for (const int count : {1, 15, 16, 17, 100}) {
      std::vector<float> row = values.floats(count);
      std::vector<std::int8_t> codes(static_cast<std::size_t>(count) + 1, 55);
      const float scale = integer.quantise(row.data(), count, codes.data());
      float largest = 0.0f;
      for (const float value : row) largest = std::fmax(largest, std::fabs(value));
      CHECK(scale == doctest::Approx(largest / 127.0f));
      for (int k = 0; k < count; ++k) {
        const std::size_t at = static_cast<std::size_t>(k);
        CHECK(std::fabs(static_cast<float>(codes[at]) * scale - row[at]) <= 0.501f * scale);
      }
      CHECK(codes.back() == 55);
      std::fill(row.begin(), row.end(), 0.0f);
      CHECK(integer.quantise(row.data(), count, codes.data()) == 0.0f);
      CHECK(codes.front() == 0);
    }
  });
}

TEST_CASE("a row with NaN is NaN") {
  for_each_integer_rung([](const KernelTable&, const IntegerKernels& integer) {
    for (const std::size_t at : {std::size_t{0}, std::size_t{15}, std::size_t{16}, std::size_t{36}}) {
      std::vector<float> row(37, 1.0f);
      row[at] = std::numeric_limits<float>::quiet_NaN();
      std::vector<std::int8_t> codes(row.size());
      CHECK(std::isnan(integer.quantise(row.data(), 37, codes.data())));
    }
  });
}

// Under the emulator AMX's signed bytes are taken for unsigned: there only values both readings agree on are used, and
// tile_model_test.cc shows that signs are right.
TEST_CASE("integer products are exact up to their scales") {
  for_each_integer_rung([](const KernelTable& kernels, const IntegerKernels& integer) {
    const bool signs = !(emulated() && kernels.isa == Isa::kAmxInt8);
    Values values;
    for (const Shape& shape : kShapes) {
      CAPTURE(shape.rows);
      CAPTURE(shape.outputs);
      CAPTURE(shape.depth);
      std::vector<float> dense = values.floats(std::int64_t{shape.outputs} * shape.depth);
      if (!signs) {
        for (float& value : dense) value = std::fabs(value);
      }
      const std::vector<bf16_t> bits = bf16_bits(dense);
      PackedTensor tensor(1, {WeightFormat::kInt8, shape.outputs, shape.depth});
      tensor.encode(0, {bits.data(), shape.depth, 1});
      const std::int64_t stride = (shape.depth + 63) / 64 * 64 + 64;
      std::vector<std::int8_t> codes(static_cast<std::size_t>((shape.rows + kRowSlack) * stride), 0);
      std::vector<float> scales;
      for (int m = 0; m < shape.rows; ++m) {
        for (int k = 0; k < shape.depth; ++k) {
          codes[static_cast<std::size_t>(m * stride + k)] =
              static_cast<std::int8_t>(signs ? values.below(255) - 127 : values.below(128));
        }
        scales.push_back(0.01f + 0.001f * static_cast<float>(m));
      }
      const std::int64_t c_stride = (shape.outputs + 63) / 32 * 32;
      std::vector<float> c = values.floats((shape.rows + kRowSlack) * c_stride);
      const std::vector<float> before = c;
      const int row_blocks = (shape.outputs + kBlockRows - 1) / kBlockRows;
      integer.multiply({codes.data(), stride, scales.data()}, shape.rows, tensor.matrix(0), 0, row_blocks, c.data(),
                       c_stride);
      bool close = true;
      for (int m = 0; m < shape.rows; ++m) {
        for (int n = 0; n < shape.outputs; ++n) {
          double sum = 0.0, absolute = 0.0;
          for (int k = 0; k < shape.depth; ++k) {
            const double term = static_cast<double>(codes[static_cast<std::size_t>(m * stride + k)]) *
                                decode_element(tensor.matrix(0), n, k);
            sum += term;
            absolute += std::fabs(term);
          }
          const std::size_t at = static_cast<std::size_t>(m * c_stride + n);
          const double expected = before[at] + sum * scales[static_cast<std::size_t>(m)];
          // The reference's weights are codes times scales rounded to fp32, which the kernel never rounds.
          const double size = std::fabs(before[at]) + absolute * scales[static_cast<std::size_t>(m)];
          close = close && std::fabs(c[at] - expected) <= 4 * std::numeric_limits<float>::epsilon() * size;
        }
      }
      CHECK(close);
    }
    record_integer_kernel(kernels.isa);
  });
}

}  // namespace
}  // namespace kt_expert
