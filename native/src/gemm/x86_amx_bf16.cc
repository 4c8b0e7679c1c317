// AMX BF16: rows and panels of bf16 in tiles, 16 x 16 outputs and 32 depths an instruction. The blocks of bf16 weights
// are such panels already, so the forward multiplies them where they lie.
#include "gemm/x86_amx.h"
#include "gemm/x86_avx512.h"

namespace kt_expert {
namespace {

constexpr std::int64_t kOperandBytes = 2;
constexpr std::int64_t kSumBytes = 4;
constexpr WeightFormat kFormat = WeightFormat::kBf16;
static_assert(block_bytes(kFormat) == kTileBytes, "a block is a tile");

TileOperands operands_of(const LeftRows& a, const void* panels, std::int64_t panel_stride, int depth) {
  return {static_cast<const std::uint8_t*>(a.base), a.stride * kOperandBytes, static_cast<const std::uint8_t*>(panels),
          panel_stride, depth / kTileDepth};
}

void multiply(const LeftRows& a, int rows, int depth, const void* panels, std::int64_t panel_stride, int panel_count,
              float* c, std::int64_t c_stride) {
  HardwareTiles<false> tiles;
  multiply_tiles<false>(tiles, operands_of(a, panels, panel_stride, depth), rows, panel_count,
                        reinterpret_cast<std::uint8_t*>(c), c_stride * kSumBytes);
}

void multiply_blocks(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                     std::int64_t c_stride) {
  HardwareTiles<false> tiles;
  const std::int64_t stride = std::int64_t{w.depth_blocks} * kTileBytes;
  for (int j = 0; j < range.row_blocks; j += kTilePanels) {
    const int panels = range.row_blocks - j < kTilePanels ? range.row_blocks - j : kTilePanels;
    const std::uint8_t* first = block_at<kFormat>(w, range.first_row + j, range.first_depth);
    multiply_tiles<false>(tiles, operands_of(a, first, stride, range.depth_blocks * kBlockDepth), rows, panels,
                          reinterpret_cast<std::uint8_t*>(c + static_cast<std::int64_t>(j) * kBlockRows),
                          c_stride * kSumBytes);
  }
}

double burn(std::int64_t rounds) {
  constexpr int kChains = 4, kFlopEach = 2 * kTileRows * kTileRows * kTileDepth;
  HardwareTiles<false> tiles;  // configured tiles are zero
  for (std::int64_t round = 0; round < rounds; ++round) {
    tiles.dot<0, 4, 6>();
    tiles.dot<1, 4, 7>();
    tiles.dot<2, 5, 6>();
    tiles.dot<3, 5, 7>();
  }
  return static_cast<double>(kChains * kFlopEach) * static_cast<double>(rounds);
}

KernelTable make_table() {
  KernelTable table{};
  table.isa = Isa::kAmxBf16;
  table.name = "amx_bf16_32x32";
  table.operand = OperandType::kBf16;
  table.tile_rows = 2 * kTileRows;
  table.tile_panels = kTilePanels;
  table.depth_step = kTileDepth;
  table.gathers = false;
  set_pair_formats(table, multiply_blocks);
  table.expand_f32_nk = expand_tiles_nk;
  table.expand_f32_kn = expand_tiles_kn;
  table.multiply = multiply;
  set_avx512_loops(table);
  table.burn = burn;
  return table;
}

}  // namespace

const KernelTable& amx_bf16_kernels() {
  static const KernelTable kTable = make_table();
  return kTable;
}

}  // namespace kt_expert
