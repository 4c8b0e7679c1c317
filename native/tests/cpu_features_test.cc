#include "kt_expert/cpu_features.h"

#include <doctest/doctest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "isas.h"
#include "kt_expert/error.h"

namespace kt_expert {
namespace {

TEST_CASE("no ISA that rounds activations is chosen without being named") {
  CHECK(!rounds_activations(choose_isa("")));
  CHECK(isa_supported(choose_isa("")));
}

TEST_CASE("asking for an ISA by name gives it or says what is missing") {
  for (Isa isa : all_isas()) {
    if (isa_supported(isa)) {
      CHECK(choose_isa(isa_name(isa)) == isa);
      CHECK(kernels_for(isa).isa == isa);
    } else {
      CHECK_THROWS_WITH_AS(choose_isa(isa_name(isa)), doctest::Contains(isa_obstacle(isa).c_str()), Unsupported);
      CHECK_THROWS_AS(kernels_for(isa), Unsupported);
    }
  }
  CHECK_THROWS_AS(choose_isa("avx9000"), InvalidArgument);
}

// Without this request the first tile instruction is an illegal one.
TEST_CASE("permission for tiles is asked of the kernel before they are used") {
  if (!isa_supported(Isa::kAmxBf16)) return;
  constexpr int kGetPermission = 0x1022;  // ARCH_GET_XCOMP_PERM
  constexpr unsigned long kTileData = 1ul << 18;
  unsigned long permitted = 0;
  REQUIRE(syscall(SYS_arch_prctl, kGetPermission, &permitted) == 0);
  CHECK((permitted & kTileData) != 0);
}

}  // namespace
}  // namespace kt_expert
