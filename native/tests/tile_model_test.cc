// The AMX products on a model of the tile unit, on any machine: which rows and panels meet, what edges do, and signs,
// which no emulator gets right. The model follows the operation sections of TILELOADD, TILESTORED, TDPBF16PS and
// TDPBSSD in the Intel SDM, volume 2.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "gemm/x86_amx_tiles.h"
#include "isas.h"
#include "kt_expert/bf16.h"

namespace kt_expert {
namespace {

template <bool kInt8>
class ModelTiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile].data(), 0, kTileBytes);
  }
  template <int kTile>
  void load(const void* base, std::int64_t stride) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(tiles_[kTile].data() + row * kTileRowBytes, static_cast<const std::uint8_t*>(base) + row * stride,
                  kTileRowBytes);
    }
  }
  template <int kTile>
  void store(void* base, std::int64_t stride) const {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(static_cast<std::uint8_t*>(base) + row * stride, tiles_[kTile].data() + row * kTileRowBytes,
                  kTileRowBytes);
    }
  }
  template <int kSum, int kLeft, int kRight>
  void dot() {
    constexpr int kPerWord = kInt8 ? 4 : 2;
    for (int m = 0; m < kTileRows; ++m) {
      for (int k = 0; k < kTileRows; ++k) {
        for (int n = 0; n < kTileRows; ++n) {
          for (int i = 0; i < kPerWord; ++i) add<kSum>(m, n, value<kLeft>(m, k, i), value<kRight>(k, n, i));
        }
      }
    }
  }

 private:
  // Element i of word `word` of a row.
  template <int kTile>
  double value(int row, int word, int i) const {
    const std::uint8_t* at = tiles_[kTile].data() + row * kTileRowBytes + word * 4;
    if (kInt8) return static_cast<std::int8_t>(at[i]);
    bf16_t bits;
    std::memcpy(&bits, at + 2 * i, sizeof bits);
    return bf16_to_float(bits);
  }
  template <int kTile>
  void add(int row, int word, double left, double right) {
    std::uint8_t* at = tiles_[kTile].data() + row * kTileRowBytes + word * 4;
    using Sum = std::conditional_t<kInt8, std::int32_t, float>;
    Sum sum;
    std::memcpy(&sum, at, sizeof sum);
    sum = static_cast<Sum>(static_cast<double>(sum) + left * right);
    std::memcpy(at, &sum, sizeof sum);
  }

  std::array<std::array<std::uint8_t, kTileBytes>, 8> tiles_{};
};

struct Shape {
  int rows, panels, depth;  // depth in tiles
};
const Shape kShapes[] = {{1, 1, 1},  {5, 2, 2},  {16, 3, 1}, {16, 4, 3}, {17, 1, 2},
                         {31, 3, 1}, {32, 4, 2}, {33, 2, 1}, {70, 3, 2}};

int whole_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

TEST_CASE("tile products of bf16 meet the right rows, panels and depths") {
  constexpr int kTileDepth = 32;
  for (const Shape& shape : kShapes) {
    CAPTURE(shape.rows);
    CAPTURE(shape.panels);
    Values values;
    const int depth = shape.depth * kTileDepth, columns = shape.panels * kTileRows, rows = whole_tiles(shape.rows);
    const std::int64_t a_stride = depth + 8;
    const std::vector<float> a = values.bf16_floats(rows * a_stride),
                             w = values.bf16_floats(std::int64_t{columns} * depth);
    PackedTensor tensor(1, {WeightFormat::kBf16, columns, depth});
    const std::vector<bf16_t> w_bits = bf16_bits(w), a_bits = bf16_bits(a);
    tensor.encode(0, {w_bits.data(), depth, 1});
    std::vector<float> c = values.floats(std::int64_t{rows} * columns);
    const std::vector<float> before = c;
    ModelTiles<false> tiles;
    const TileOperands in{reinterpret_cast<const std::uint8_t*>(a_bits.data()), a_stride * 2, tensor.matrix(0).blocks,
                          std::int64_t{shape.depth} * kTileBytes, shape.depth};
    multiply_tiles<false>(tiles, in, shape.rows, shape.panels, reinterpret_cast<std::uint8_t*>(c.data()),
                          std::int64_t{columns} * 4);
    bool close = true;
    for (int m = 0; m < shape.rows; ++m) {
      for (int n = 0; n < columns; ++n) {
        const std::size_t at = static_cast<std::size_t>(m * columns + n);
        double sum = before[at], absolute = std::fabs(sum);
        for (int k = 0; k < depth; ++k) {
          const double term = static_cast<double>(a[static_cast<std::size_t>(m * a_stride + k)]) *
                              w[static_cast<std::size_t>(n * depth + k)];
          sum += term;
          absolute += std::fabs(term);
        }
        close = close && std::fabs(c[at] - sum) <= chain_tolerance(depth, absolute);
      }
    }
    CHECK(close);
  }
}

TEST_CASE("tile products of int8 are exact, signs included") {
  constexpr int kTileDepth = 64;
  for (const Shape& shape : kShapes) {
    CAPTURE(shape.rows);
    CAPTURE(shape.panels);
    Values values;
    const int depth = shape.depth * kTileDepth, columns = shape.panels * kTileRows, rows = whole_tiles(shape.rows);
    const auto codes = [&](std::int64_t count) {
      std::vector<std::uint8_t> drawn;
      for (std::int64_t i = 0; i < count; ++i) drawn.push_back(static_cast<std::uint8_t>(values.below(256)));
      return drawn;
    };
    const std::vector<std::uint8_t> a = codes(std::int64_t{rows} * depth), w = codes(std::int64_t{columns} * depth);
    const std::vector<float> scales(static_cast<std::size_t>(columns), 1.0f);
    PackedTensor tensor(1, {WeightFormat::kInt8, columns, depth});
    tensor.set_native(0, {w.data(), depth, reinterpret_cast<const std::uint8_t*>(scales.data()), 4});
    std::vector<std::int32_t> c(static_cast<std::size_t>(rows * columns), 77);
    ModelTiles<true> tiles;
    const TileOperands in{a.data(), depth, tensor.matrix(0).blocks, std::int64_t{shape.depth} * kTileBytes,
                          shape.depth};
    multiply_tiles<true>(tiles, in, shape.rows, shape.panels, reinterpret_cast<std::uint8_t*>(c.data()),
                         std::int64_t{columns} * 4);
    bool exact = true;
    for (int m = 0; m < shape.rows; ++m) {
      for (int n = 0; n < columns; ++n) {
        std::int32_t sum = 0;
        for (int k = 0; k < depth; ++k) {
          sum += static_cast<std::int8_t>(a[static_cast<std::size_t>(m * depth + k)]) *
                 static_cast<std::int8_t>(w[static_cast<std::size_t>(n * depth + k)]);
        }
        exact = exact && c[static_cast<std::size_t>(m * columns + n)] == sum;
      }
    }
    CHECK(exact);
  }
}

}  // namespace
}  // namespace kt_expert
