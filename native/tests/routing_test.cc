#include "kt_expert/routing.h"

#include <doctest/doctest.h>

#include <stdexcept>
#include <vector>

namespace kt_expert {
namespace {

Routing route(std::vector<std::int32_t> ids, std::vector<float> weights, int tokens, int top_k, int experts) {
  return build_routing({ids.data(), ids.size()}, {weights.data(), weights.size()}, tokens, top_k, experts);
}

TEST_CASE("rows are grouped by expert in token order and sentinels are dropped") {
  const Routing routing = route({2, 0, 3, 2, 0, 2}, {1, 2, 3, 4, 5, 6}, 3, 2, 3);
  CHECK(routing.routes == 5);
  CHECK(routing.expert_begin == std::vector<std::int32_t>{0, 2, 2, 5});
  CHECK(routing.row_token == std::vector<std::int32_t>{0, 2, 0, 1, 2});
  CHECK(routing.row_weight == std::vector<float>{2, 5, 1, 4, 6});
  CHECK(routing.slot_row == std::vector<std::int32_t>{2, 0, Routing::kDropped, 3, 1, 4});
  CHECK(routing.active == std::vector<std::int32_t>{0, 2});
}

TEST_CASE("no tokens are a legal batch") {
  const Routing routing = route({}, {}, 0, 2, 4);
  CHECK(routing.routes == 0);
  CHECK(routing.active.empty());
}

TEST_CASE("bad routings are refused") {
  CHECK_THROWS_WITH_AS(route({4}, {1}, 1, 1, 3), doctest::Contains("expert id 4 at token 0, slot 0"),
                       std::runtime_error);
  CHECK_THROWS_WITH_AS(route({-1}, {1}, 1, 1, 3), doctest::Contains("expert id -1"), std::runtime_error);
  CHECK_THROWS_WITH_AS(route({0}, {1, 1}, 1, 1, 3), doctest::Contains("1 ids and 2 weights"), std::runtime_error);
}

}  // namespace
}  // namespace kt_expert
