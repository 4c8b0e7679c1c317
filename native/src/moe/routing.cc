#include "kt_expert/routing.h"

#include <string>

#include "kt_expert/error.h"

namespace kt_expert {
namespace {

std::string place(std::size_t slot, int top_k, std::uint32_t first_token) {
  const std::size_t k = static_cast<std::size_t>(top_k);
  return "token " + std::to_string(first_token + slot / k) + ", slot " + std::to_string(slot % k);
}

void validate(Span<const std::int32_t> ids, Span<const float> weights, int tokens, int top_k, int experts,
              std::uint32_t first_token) {
  const std::int64_t slots = static_cast<std::int64_t>(tokens) * top_k;
  if (tokens < 0 || top_k < 1 || static_cast<std::int64_t>(ids.size()) != slots || weights.size() != ids.size()) {
    throw InvalidArgument("routing of " + std::to_string(tokens) + " tokens and top-k " + std::to_string(top_k) +
                          " came with " + std::to_string(ids.size()) + " ids and " + std::to_string(weights.size()) +
                          " weights");
  }
  for (std::size_t slot = 0; slot < ids.size(); ++slot) {
    if (ids[slot] < 0 || ids[slot] > experts) {
      throw InvalidArgument("expert id " + std::to_string(ids[slot]) + " at " + place(slot, top_k, first_token) +
                            " is outside [0, " + std::to_string(experts) + "); " + std::to_string(experts) +
                            " itself is the sentinel for a route to skip");
    }
  }
}

}  // namespace

Routing build_routing(Span<const std::int32_t> ids, Span<const float> weights, int tokens, int top_k, int experts,
                      std::uint32_t first_token) {
  validate(ids, weights, tokens, top_k, experts, first_token);
  Routing routing;
  routing.tokens = tokens;
  routing.top_k = top_k;
  routing.expert_begin.assign(static_cast<std::size_t>(experts) + 1, 0);
  for (std::int32_t id : ids) {
    if (id < experts) ++routing.expert_begin[static_cast<std::size_t>(id) + 1];
  }
  for (int e = 0; e < experts; ++e) {
    const std::size_t at = static_cast<std::size_t>(e);
    if (routing.expert_begin[at + 1] > 0) routing.active.push_back(e);
    routing.expert_begin[at + 1] += routing.expert_begin[at];
  }
  routing.routes = routing.expert_begin.back();
  routing.row_token.resize(static_cast<std::size_t>(routing.routes));
  routing.row_weight.resize(static_cast<std::size_t>(routing.routes));
  routing.slot_row.assign(ids.size(), Routing::kDropped);
  std::vector<std::int32_t> next(routing.expert_begin.begin(), routing.expert_begin.end() - 1);
  for (std::size_t slot = 0; slot < ids.size(); ++slot) {
    if (ids[slot] == experts) continue;
    const std::int32_t row = next[static_cast<std::size_t>(ids[slot])]++;
    routing.slot_row[slot] = row;
    routing.row_token[static_cast<std::size_t>(row)] =
        static_cast<std::int32_t>(slot / static_cast<std::size_t>(top_k));
    routing.row_weight[static_cast<std::size_t>(row)] = weights[slot];
  }
  return routing;
}

std::int64_t routing_bytes(std::int64_t tokens, int top_k, int experts) {
  const std::int64_t per_slot = sizeof(std::int32_t) * 2 + sizeof(float);
  return tokens * top_k * per_slot + (2 * static_cast<std::int64_t>(experts) + 1) * sizeof(std::int32_t);
}

}  // namespace kt_expert
