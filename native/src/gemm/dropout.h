// Dropout of a LoRA's input by a counter-based generator: whether a value is dropped depends on where it stands and on
// nothing else, so a recompute, another thread count or another instruction set drop the same ones.
#pragma once

#include <array>
#include <cstdint>

namespace kt_expert {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  constexpr int kRounds = 10;
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kMultiplier0} * counter[0];
    const std::uint64_t product1 = std::uint64_t{kMultiplier1} * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

// One row of values: a token's x, or its h in one expert.
struct DropoutRow {
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;
  std::uint32_t token = 0;
  std::uint32_t site = 0;       // 0 for x, expert + 1 for h
  std::uint32_t threshold = 0;  // values whose random word is below are dropped
  float scale = 1.0f;           // of those that stay
};
constexpr int kDropoutChannels = 4;  // one counter's words; rows are dropped from a multiple of it on

// values[i] is that of channel first + i.
inline void drop_row(const DropoutRow& row, std::int64_t first, float* values, std::int64_t count) {
  const std::array<std::uint32_t, 2> key{static_cast<std::uint32_t>(row.seed),
                                         static_cast<std::uint32_t>(row.seed >> 32)};
  for (std::int64_t i = 0; i < count; i += kDropoutChannels) {
    const std::uint32_t group = static_cast<std::uint32_t>((first + i) / kDropoutChannels);
    const std::array<std::uint32_t, 4> words = philox({group, row.token, row.site, row.layer}, key);
    const std::int64_t here = count - i < kDropoutChannels ? count - i : kDropoutChannels;
    for (std::int64_t j = 0; j < here; ++j) {
      values[i + j] = words[static_cast<std::size_t>(j)] < row.threshold ? 0.0f : values[i + j] * row.scale;
    }
  }
}

}  // namespace kt_expert
