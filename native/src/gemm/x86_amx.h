// The processor's tile unit behind the interface of x86_amx_tiles.h.
//
// The instructions are written out because gcc 12's intrinsics are wrong about memory: _tile_loadconfig reads 8 bytes
// of its 64 in the compiler's eyes, and _tile_loadd may be moved before the stores to its source.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gemm/x86_amx_tiles.h"

namespace kt_expert {
namespace {

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

// kInt8: dot() is TDPBSSD, else TDPBF16PS. Tiles are configured for the object's lifetime: a thread that holds none
// costs less to switch.
template <bool kInt8>
class HardwareTiles {
 public:
  HardwareTiles() {
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = kTileRowBytes;
      config.rows[t] = kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~HardwareTiles() { asm volatile("tilerelease" : : : "memory"); }
  HardwareTiles(const HardwareTiles&) = delete;
  HardwareTiles& operator=(const HardwareTiles&) = delete;

  template <int kTile>
  __attribute__((always_inline)) void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  __attribute__((always_inline)) void load(const void* base, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(base), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  __attribute__((always_inline)) void store(void* base, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(base), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  __attribute__((always_inline)) void dot() {
    if constexpr (kInt8) {
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
    } else {
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
    }
  }
};

}  // namespace
}  // namespace kt_expert
