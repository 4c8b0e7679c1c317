// Products in AMX tiles, over anything that behaves like the tile unit: the processor's own, or a model of it that runs
// anywhere and that tests use for what no emulator gets right.
//
// A Tiles has configure(), release(), load<t>(base, stride), store<t>(base, stride), zero<t>() and one multiply:
// dot<c, a, b>(). Tiles are 16 rows of 64 bytes. Registers 0..3 accumulate, 4 and 5 hold rows of A, 6 and 7 panels.
// Four accumulators hide the latency of a multiply (52 cycles, one issued every 16).
#pragma once

#include <cstdint>
#include <type_traits>

namespace kt_expert {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;

// Operands of a product whose depth is counted in tiles. A is row-major; a panel's tiles follow each other.
struct TileOperands {
  const std::uint8_t* a;
  std::int64_t a_stride;  // bytes
  const std::uint8_t* panels;
  std::int64_t panel_stride;  // bytes
  int depth;                  // tiles
};

// 32 rows x 2 panels, or 16 rows x up to 4 panels: accumulator kRowTiles x kPanels, four at most. C is 4 bytes an
// element, its stride in bytes. kFresh starts from zero instead of from C.
template <int kRowTiles, int kPanels, bool kFresh, typename Tiles>
__attribute__((always_inline)) inline void tile_block(Tiles& tiles, const TileOperands& in, std::uint8_t* c,
                                                      std::int64_t c_stride) {
  static_assert(kRowTiles * kPanels <= 4, "four accumulators");
  const std::int64_t low_rows = kTileRows * c_stride;
  const auto begin = [&](auto tile, const std::uint8_t* from) __attribute__((always_inline)) {
    if constexpr (kFresh) {
      tiles.template zero<tile.value>();
    } else {
      tiles.template load<tile.value>(from, c_stride);
    }
  };
  const auto each_accumulator = [&](const auto& body) __attribute__((always_inline)) {
    body(std::integral_constant<int, 0>{}, c);
    if constexpr (kRowTiles == 2) {
      if constexpr (kPanels == 2) body(std::integral_constant<int, 1>{}, c + kTileRowBytes);
      body(std::integral_constant<int, 2>{}, c + low_rows);
      if constexpr (kPanels == 2) body(std::integral_constant<int, 3>{}, c + low_rows + kTileRowBytes);
    } else {
      if constexpr (kPanels > 1) body(std::integral_constant<int, 1>{}, c + kTileRowBytes);
      if constexpr (kPanels > 2) body(std::integral_constant<int, 2>{}, c + 2 * kTileRowBytes);
      if constexpr (kPanels > 3) body(std::integral_constant<int, 3>{}, c + 3 * kTileRowBytes);
    }
  };
  each_accumulator(begin);
  const std::uint8_t* a = in.a;
  const std::uint8_t* b = in.panels;
  for (int k = 0; k < in.depth; ++k, a += kTileRowBytes, b += kTileBytes) {
    tiles.template load<4>(a, in.a_stride);
    tiles.template load<6>(b, kTileRowBytes);
    tiles.template dot<0, 4, 6>();
    if constexpr (kRowTiles == 2) {
      tiles.template load<5>(a + kTileRows * in.a_stride, in.a_stride);
      tiles.template dot<2, 5, 6>();
      if constexpr (kPanels == 2) {
        tiles.template load<7>(b + in.panel_stride, kTileRowBytes);
        tiles.template dot<1, 4, 7>();
        tiles.template dot<3, 5, 7>();
      }
    } else {
      if constexpr (kPanels > 1) {
        tiles.template load<7>(b + in.panel_stride, kTileRowBytes);
        tiles.template dot<1, 4, 7>();
      }
      if constexpr (kPanels > 2) {
        tiles.template load<6>(b + 2 * in.panel_stride, kTileRowBytes);
        tiles.template dot<2, 4, 6>();
      }
      if constexpr (kPanels > 3) {
        tiles.template load<7>(b + 3 * in.panel_stride, kTileRowBytes);
        tiles.template dot<3, 4, 7>();
      }
    }
  }
  each_accumulator([&](auto tile, std::uint8_t* to)
                       __attribute__((always_inline)) { tiles.template store<tile.value>(to, c_stride); });
}

constexpr int kTilePanels = 4;  // panels a call may bring

// Rows past `rows` up to a whole tile are read and written too; what they hold is unused.
template <bool kFresh, typename Tiles>
void multiply_tiles(Tiles& tiles, const TileOperands& operands, int rows, int panel_count, std::uint8_t* c,
                    std::int64_t c_stride) {
  for (int first = 0; first < rows; first += 2 * kTileRows) {
    TileOperands in = operands;
    in.a += first * in.a_stride;
    std::uint8_t* target = c + first * c_stride;
    if (rows - first > kTileRows) {
      int p = 0;
      for (; p + 2 <= panel_count; p += 2) {
        tile_block<2, 2, kFresh>(tiles, in, target + p * kTileRowBytes, c_stride);
        in.panels += 2 * in.panel_stride;
      }
      if (p < panel_count) tile_block<2, 1, kFresh>(tiles, in, target + p * kTileRowBytes, c_stride);
      continue;
    }
    switch (panel_count) {
      case 1:
        tile_block<1, 1, kFresh>(tiles, in, target, c_stride);
        break;
      case 2:
        tile_block<1, 2, kFresh>(tiles, in, target, c_stride);
        break;
      case 3:
        tile_block<1, 3, kFresh>(tiles, in, target, c_stride);
        break;
      default:
        tile_block<1, 4, kFresh>(tiles, in, target, c_stride);
    }
  }
}

}  // namespace
}  // namespace kt_expert
