// The fuzz target on random bytes: what a coverage-guided fuzzer runs for hours runs here for a moment, in every build.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isas.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace kt_expert {
namespace {

TEST_CASE("random bytes neither crash nor decode to what they should not") {
  Values values(21);
  const int inputs = emulated() ? 10 : 400;
  for (int input = 0; input < inputs; ++input) {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(values.below(300)));
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(values.below(256));
    // The first byte picks the target: half of the inputs are weights, a quarter passes, a quarter routes.
    constexpr std::uint8_t kTargets[] = {0, 1, 0, 8};
    if (!bytes.empty()) bytes[0] = kTargets[input % 4];
    CHECK(LLVMFuzzerTestOneInput(bytes.data(), bytes.size()) == 0);
  }
}

}  // namespace
}  // namespace kt_expert
