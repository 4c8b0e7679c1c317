// Summing the rows of all routes into rows of tokens, a block of columns at a time.
//
// A task owns its columns for every token and visits experts in ascending order, so a token's routes are always added
// in the order of their experts and nothing is shared between tasks. With several memory nodes every node sums its own
// part, and the parts are added in node order.
#pragma once

#include "kt_expert/engine.h"
#include "moe/arena.h"

namespace kt_expert {

struct TokenSums {
  std::int64_t tokens = 0;
  std::int64_t width = 0;
  int nodes = 1;
  float* parts = nullptr;  // [nodes, tokens of all batches, width]; null where the outputs themselves are summed into

  // One node and an fp32 output need no memory of their own.
  static TokenSums take(Carver& carver, std::int64_t tokens, std::int64_t width, int nodes, FloatType output) {
    TokenSums sums{tokens, width, nodes, nullptr};
    if (nodes > 1 || output == FloatType::kBf16) sums.parts = carver.take<float>(nodes * tokens * width);
    return sums;
  }
};

}  // namespace kt_expert
