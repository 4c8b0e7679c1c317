// Weight formats: what a code means, what is nearest, and that what goes in comes out of the resident blocks.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

#include "isas.h"
#include "kt_expert/error.h"
#include "weights/codes.h"

namespace kt_expert {
namespace {

// Largest error of a value whose group's largest magnitude is 1: half of the widest gap between codes, on that scale.
double widest_half_gap(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt8:
      return 0.5 / kInt8Max;
    case WeightFormat::kInt4G32:
    case WeightFormat::kInt4G128:
      return 0.5 / kInt4Max + 0x1p-8;  // the scale is rounded to bf16
    case WeightFormat::kFp8:
      return 16.0 / kFp8Max;
    case WeightFormat::kMxfp4:
      return 0.25;  // codes 4 and 6 where the scale makes the largest magnitude 4 to 8
    case WeightFormat::kNf4:
      return 0.152;  // between the two lowest codes
    case WeightFormat::kBf16:
      break;
  }
  return 0.0;
}

TEST_CASE("every code decodes and encodes to itself") {
  for (WeightFormat format : all_weight_formats()) {
    CAPTURE(std::string(weight_format_name(format)));
    if (format == WeightFormat::kBf16) continue;
    const int codes = 1 << bits_of(format);
    for (int code = 0; code < codes; ++code) {
      CAPTURE(code);
      const std::uint8_t bits = static_cast<std::uint8_t>(code);
      if (format == WeightFormat::kFp8 && is_fp8_nan(bits)) continue;
      const float value = decode_code(format, bits);
      const bool below_symmetric =
          (format == WeightFormat::kInt8 && value == -128.0f) ||
          ((format == WeightFormat::kInt4G32 || format == WeightFormat::kInt4G128) && value == -8.0f);
      if (below_symmetric) continue;  // the quantiser keeps to symmetric codes; checkpoints may hold it
      CHECK(decode_code(format, encode_code(format, value)) == value);
    }
  }
}

TEST_CASE("fp8 codes are OCP E4M3") {
  CHECK(decode_fp8(0x00) == 0.0f);
  CHECK(decode_fp8(0x01) == std::ldexp(1.0f, -9));
  CHECK(decode_fp8(0x08) == std::ldexp(1.0f, -6));
  CHECK(decode_fp8(0x38) == 1.0f);
  CHECK(decode_fp8(0x7E) == 448.0f);
  CHECK(decode_fp8(0xFE) == -448.0f);
  CHECK(is_fp8_nan(0x7F));
  CHECK(is_fp8_nan(0xFF));
  CHECK(encode_code(WeightFormat::kFp8, 1000.0f) == 0x7E);
}

TEST_CASE("encoding picks the nearest code of the group") {
  Values values;
  for (WeightFormat format : all_weight_formats()) {
    CAPTURE(std::string(weight_format_name(format)));
    for (const int depth : {1, 31, 32, 70, 300}) {
      const int rows = 37;
      PackedTensor tensor(2, {format, rows, depth});
      const std::vector<float> dense = values.bf16_floats(rows * depth);
      const std::vector<bf16_t> bits = bf16_bits(dense);
      tensor.encode(1, {bits.data(), depth, 1});
      const float largest = 6.0f;  // of a normal deviate, generously
      for (int row = 0; row < rows; ++row) {
        for (int k = 0; k < depth; ++k) {
          const float got = decode_element(tensor.matrix(1), row, k);
          const float expected = dense[static_cast<std::size_t>(row * depth + k)];
          CHECK(std::fabs(got - expected) <= widest_half_gap(format) * largest);
        }
      }
      CHECK(decode_element(tensor.matrix(0), rows - 1, depth - 1) == 0.0f * decode_element(tensor.matrix(0), 0, 0));
    }
  }
}

TEST_CASE("a transposed source gives the same blocks") {
  Values values;
  const int rows = 21, depth = 45;
  const std::vector<bf16_t> dense = bf16_bits(values.floats(rows * depth));
  std::vector<bf16_t> turned(dense.size());
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < depth; ++k) {
      turned[static_cast<std::size_t>(k * rows + row)] = dense[static_cast<std::size_t>(row * depth + k)];
    }
  }
  for (WeightFormat format : all_weight_formats()) {
    PackedTensor tensor(2, {format, rows, depth});
    tensor.encode(0, {dense.data(), depth, 1});
    tensor.encode(1, {turned.data(), 1, rows});
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < depth; ++k) {
        CHECK(decode_element(tensor.matrix(0), row, k) == decode_element(tensor.matrix(1), row, k));
      }
    }
  }
}

TEST_CASE("a checkpoint's own codes are kept as they are") {
  Values values;
  for (WeightFormat format : all_weight_formats()) {
    CAPTURE(std::string(weight_format_name(format)));
    const int rows = 130, depth = 140;
    const PackedShape shape{format, rows, depth};
    const int row_bytes = depth * bits_of(format) / 8;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(rows * row_bytes));
    for (std::uint8_t& byte : codes) {
      byte = static_cast<std::uint8_t>(values.below(256));
      if (format == WeightFormat::kFp8 && is_fp8_nan(byte)) byte = 0;
    }
    const int scale_rows = format == WeightFormat::kFp8 ? 2 : rows, groups = shape.scale_groups();
    std::vector<std::uint8_t> scales(static_cast<std::size_t>(scale_rows * groups * scale_bytes(format)));
    for (int s = 0; s < scale_rows * groups; ++s) {
      const std::uint32_t bits = encode_scale(format, 0.5f + 0.01f * static_cast<float>(values.below(100)));
      std::memcpy(scales.data() + s * scale_bytes(format), &bits, static_cast<std::size_t>(scale_bytes(format)));
    }
    PackedTensor tensor(1, shape);
    tensor.set_native(0, {codes.data(), row_bytes, scales.data(), groups * scale_bytes(format)});
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < depth; ++k) {
        const std::uint8_t* line = codes.data() + row * row_bytes;
        float expected;
        if (format == WeightFormat::kBf16) {
          bf16_t bits;
          std::memcpy(&bits, line + 2 * k, sizeof bits);
          if ((bits & 0x7F80) == 0x7F80) continue;  // infinities and NaN compare by other rules
          expected = bf16_to_float(bits);
        } else {
          const int nibble = (line[k / 2] >> (k % 2 * 4)) & 0xF;
          const bool signed_nibble = format == WeightFormat::kInt4G32 || format == WeightFormat::kInt4G128;
          const float value = bits_of(format) == 8 ? decode_code(format, line[k])
                              : signed_nibble      ? static_cast<float>(nibble < 8 ? nibble : nibble - 16)
                                                   : decode_code(format, static_cast<std::uint8_t>(nibble));
          const int group = scale_group(format) == kWholeRow ? 0 : k / scale_group(format);
          const int scale_row = format == WeightFormat::kFp8 ? row / kFp8ScaleRows : row;
          expected = value * decode_scale(format, scales.data() + (scale_row * groups + group) * scale_bytes(format));
        }
        REQUIRE(decode_element(tensor.matrix(0), row, k) == expected);
      }
    }
  }
}

TEST_CASE("what a format cannot hold is refused") {
  PackedTensor int8(1, {WeightFormat::kInt8, 2, 2});
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<bf16_t> source = bf16_bits({1.0f, 2.0f, infinity, 3.0f});
  CHECK_THROWS_WITH_AS(int8.encode(0, {source.data(), 2, 1}), doctest::Contains("row 1, column 0 is not finite"),
                       InvalidArgument);
  PackedTensor fp8(1, {WeightFormat::kFp8, 1, 1});
  const std::uint8_t nan_code = 0x7F, one = 0x38;
  const float good = 1.0f, bad = std::numeric_limits<float>::quiet_NaN(), large = 1e6f;
  const auto bytes = [](const float& value) { return reinterpret_cast<const std::uint8_t*>(&value); };
  CHECK_THROWS_AS(fp8.set_native(0, {&nan_code, 1, bytes(good), 4}), InvalidArgument);
  CHECK_THROWS_AS(fp8.set_native(0, {&one, 1, bytes(bad), 4}), InvalidArgument);
  CHECK_THROWS_AS(fp8.set_native(0, {&one, 1, bytes(large), 4}), InvalidArgument);
  CHECK_THROWS_WITH_AS(weight_format_from_name("int3"), doctest::Contains("choose one of: bf16, int8"),
                       InvalidArgument);
}

TEST_CASE("a matrix takes the bytes its shape announces") {
  for (WeightFormat format : all_weight_formats()) {
    const PackedShape shape{format, 100, 75};
    CHECK(PackedTensor(3, shape).bytes() == 3 * shape.bytes());
  }
}

}  // namespace
}  // namespace kt_expert
