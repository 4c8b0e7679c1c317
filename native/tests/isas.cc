#include "isas.h"

#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>

namespace kt_expert {
namespace {

std::string kernel_name(Isa isa, WeightFormat format) {
  return std::string(isa_name(isa)) + "/" + weight_format_name(format);
}

std::string integer_kernel_name(Isa isa) { return std::string(isa_name(isa)) + "/int8-activations"; }

std::set<std::string>& ran() {
  static std::set<std::string> names;
  return names;
}

}  // namespace

std::vector<Isa> tested_isas() {
  const char* wanted = std::getenv("KT_EXPERT_TEST_ISAS");
  std::vector<Isa> isas;
  if (wanted == nullptr) {
    for (Isa isa : all_isas()) {
      if (isa_supported(isa)) isas.push_back(isa);
    }
    return isas;
  }
  std::istringstream names(wanted);
  for (std::string name; std::getline(names, name, ',');) isas.push_back(choose_isa(name));
  return isas;
}

bool emulated() { return std::getenv("KT_EXPERT_TEST_EMULATED") != nullptr; }

void record_kernel(Isa isa, WeightFormat format) { ran().insert(kernel_name(isa, format)); }

void record_integer_kernel(Isa isa) { ran().insert(integer_kernel_name(isa)); }

void write_report() {
  const char* path = std::getenv("KT_EXPERT_TEST_REPORT");
  if (path == nullptr) return;
  std::ofstream report(path);
  for (const std::string& name : ran()) report << "kernel " << name << "\n";
}

std::vector<std::string> all_kernels() {
  std::vector<std::string> names;
#define KT_KERNEL(enumerator, table)                                                                      \
  for (WeightFormat format : all_weight_formats()) names.push_back(kernel_name(Isa::enumerator, format)); \
  if (rounds_activations(Isa::enumerator)) names.push_back(integer_kernel_name(Isa::enumerator));
#include "gemm/registry.inc"
#undef KT_KERNEL
  return names;
}

void for_each_rung(const std::function<void(const KernelTable&)>& body) {
  for (Isa isa : tested_isas()) {
    CAPTURE(std::string(isa_name(isa)));
    body(kernels_for(isa));
  }
}

std::vector<float> Values::floats(std::int64_t count, float deviation) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random_);
  return values;
}

std::vector<float> Values::bf16_floats(std::int64_t count, float deviation) {
  std::vector<float> values = floats(count, deviation);
  for (float& value : values) value = bf16_to_float(float_to_bf16(value));
  return values;
}

std::vector<bf16_t> bf16_bits(const std::vector<float>& values) {
  std::vector<bf16_t> bits;
  bits.reserve(values.size());
  for (float value : values) bits.push_back(float_to_bf16(value));
  return bits;
}

float operand_value(const KernelTable& kernels, float value) {
  return kernels.operand == OperandType::kF32 ? value : bf16_to_float(float_to_bf16(value));
}

std::vector<std::uint8_t> operand_rows(const KernelTable& kernels, const std::vector<float>& values) {
  const std::size_t width = static_cast<std::size_t>(operand_bytes(kernels.operand));
  std::vector<std::uint8_t> bytes(values.size() * width);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (kernels.operand == OperandType::kF32) {
      std::memcpy(bytes.data() + i * width, &values[i], width);
    } else {
      const bf16_t bits = float_to_bf16(values[i]);
      std::memcpy(bytes.data() + i * width, &bits, width);
    }
  }
  return bytes;
}

double chain_tolerance(int depth, double absolute_sum) {
  return (depth + 2) * std::numeric_limits<float>::epsilon() * absolute_sum + 1e-30;
}

}  // namespace kt_expert
