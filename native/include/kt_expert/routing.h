// Routes of one batch, grouped by expert in ascending token order: the order every sum over routes follows.
#pragma once

#include <cstdint>
#include <vector>

#include "kt_expert/span.h"

namespace kt_expert {

struct Routing {
  int tokens = 0;
  int top_k = 0;
  int routes = 0;                          // routes kept; sentinels are dropped
  std::vector<std::int32_t> expert_begin;  // [E + 1] first row of each expert
  std::vector<std::int32_t> row_token;     // [routes] token of each row
  std::vector<float> row_weight;           // [routes] routing weight of each row
  std::vector<std::int32_t> slot_row;      // [tokens * top_k] row of a slot, or kDropped
  std::vector<std::int32_t> active;        // experts with at least one row

  static constexpr std::int32_t kDropped = -1;

  int rows_of(int expert) const {
    const std::size_t e = static_cast<std::size_t>(expert);
    return expert_begin[e + 1] - expert_begin[e];
  }
  int begin_of(int expert) const { return expert_begin[static_cast<std::size_t>(expert)]; }
};

// ids and weights are [tokens, top_k]. An id equal to `experts` is the expert-parallel sentinel and dropped.
// Throws InvalidArgument for any other id outside [0, experts), or for sizes that differ; `first_token` of the batch
// they are a part of is for its text. A weight that is not finite makes its token's row so, as it does in process.
Routing build_routing(Span<const std::int32_t> ids, Span<const float> weights, int tokens, int top_k, int experts,
                      std::uint32_t first_token = 0);

// Upper bound of the bytes a Routing of this many routes holds.
std::int64_t routing_bytes(std::int64_t tokens, int top_k, int experts);

}  // namespace kt_expert
