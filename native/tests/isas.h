// Which ISAs and formats a test visits, and the record of those that ran.
//
// A "kernel" is one ISA's way with one weight format. The binary visits every ISA this machine has, or the ones
// named in KT_EXPERT_TEST_ISAS; what ran is written to the file KT_EXPERT_TEST_REPORT names, one "kernel isa/format" a
// line, so that a run here and a run in the emulator can be added up.
#pragma once

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "gemm/kernels.h"

namespace kt_expert {

std::vector<Isa> tested_isas();
// True under an emulator whose TDPBSSD takes signed bytes for unsigned (KT_EXPERT_TEST_EMULATED is set).
bool emulated();
void record_kernel(Isa isa, WeightFormat format);
// The way of an ISA that rounds activations with int8 weights, "isa/int8-activations".
void record_integer_kernel(Isa isa);
// "isa/format" of every kernel there is, whether this machine has it or not.
std::vector<std::string> all_kernels();
// Writes the report, where one is asked for.
void write_report();

// Calls body(table) for every tested ISA, with the ISA's name captured in failures.
void for_each_rung(const std::function<void(const KernelTable&)>& body);

// Reproducible random values.
class Values {
 public:
  explicit Values(unsigned seed = 7) : random_(seed) {}
  std::vector<float> floats(std::int64_t count, float deviation = 1.0f);
  // fp32 values that bf16 holds exactly.
  std::vector<float> bf16_floats(std::int64_t count, float deviation = 1.0f);
  int below(int limit) { return static_cast<int>(random_() % static_cast<unsigned>(limit)); }

 private:
  std::mt19937 random_;
};

std::vector<bf16_t> bf16_bits(const std::vector<float>& values);

// The weight an ISA multiplies with: ISAs with bf16 operands round what they decode.
float operand_value(const KernelTable& kernels, float value);

// Rows as operands of an ISA, followed by the slack the kernels may read.
std::vector<std::uint8_t> operand_rows(const KernelTable& kernels, const std::vector<float>& values);

// Error of a chain of fp32 fused multiply-adds: (depth + 2) * eps * sum |a b|.
double chain_tolerance(int depth, double absolute_sum);

}  // namespace kt_expert
