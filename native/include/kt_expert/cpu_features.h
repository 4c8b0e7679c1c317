// The instruction sets the core can be asked to run, and what this CPU and kernel allow.
#pragma once

#include <string>
#include <vector>

namespace kt_expert {

enum class Isa {
  kScalar = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Vnni = 3,
  kAvx512Bf16 = 4,
  kAmxBf16 = 5,
  kAmxInt8 = 6,
};

// ISAs that multiply int8 weights in integers, which rounds activations to eight bits: never chosen but by name.
constexpr bool rounds_activations(Isa isa) { return isa == Isa::kAvx512Vnni || isa == Isa::kAmxInt8; }

// Throws InvalidArgument for a name no ISA has.
Isa isa_from_name(const std::string& name);
const char* isa_name(Isa isa);

// Why the ISA cannot run here: what the CPU lacks or the kernel refuses; empty where it can.
std::string isa_obstacle(Isa isa);
inline bool isa_supported(Isa isa) { return isa_obstacle(isa).empty(); }

// The highest ISA this machine supports that keeps activations as they are, or `forced` (a name; empty means none).
// Throws Unsupported where the forced one cannot run here: a slower ISA is never substituted silently.
Isa choose_isa(const std::string& forced);
// Why choose_isa(forced) chose what it chose, in words for a person.
std::string explain_choice(const std::string& forced);

// Every ISA, lowest first.
std::vector<Isa> all_isas();

}  // namespace kt_expert
