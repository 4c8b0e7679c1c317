// The instruction sets the core can be asked to run, and what this CPU and kernel allow.
#pragma once

#include <string>
#include <vector>

namespace kt_expert {

enum class Isa { kScalar = 0, kAvx2 = 1 };

// Throws InvalidArgument for a name no rung of the ladder has.
Isa isa_from_name(const std::string& name);
const char* isa_name(Isa isa);

// True where the CPU has the instructions and the operating system saves their registers.
bool isa_supported(Isa isa);

// The highest rung this machine supports, or `forced` (a name; empty means none). Throws Unsupported where the forced
// one cannot run here: a slower rung is never substituted silently.
Isa choose_isa(const std::string& forced);

// Every rung, lowest first.
std::vector<Isa> all_isas();

}  // namespace kt_expert
