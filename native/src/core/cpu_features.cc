#include "kt_expert/cpu_features.h"

#include "kt_expert/error.h"

namespace kt_expert {

std::vector<Isa> all_isas() { return {Isa::kScalar, Isa::kAvx2}; }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
  }
  return "unknown";
}

Isa isa_from_name(const std::string& name) {
  std::string known;
  for (Isa isa : all_isas()) {
    if (name == isa_name(isa)) return isa;
    known += known.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  throw InvalidArgument("instruction set '" + name + "' is not known; choose one of: " + known);
}

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      // The compiler's run-time check also reads XGETBV, so a kernel that does not save YMM state says no here.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  return false;
}

Isa choose_isa(const std::string& forced) {
  if (!forced.empty()) {
    const Isa isa = isa_from_name(forced);
    if (!isa_supported(isa)) {
      throw Unsupported("instruction set '" + forced + "' was asked for, but this CPU or kernel does not offer it");
    }
    return isa;
  }
  Isa best = Isa::kScalar;
  for (Isa isa : all_isas()) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

}  // namespace kt_expert
