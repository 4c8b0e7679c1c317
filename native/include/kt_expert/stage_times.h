// Where the time of one forward or backward went.
#pragma once

#include <array>
#include <cstddef>

namespace kt_expert {

// gather: tokens as operands of the ISA. gate_up, down: products with the base model's weights. activation: the
// activation or its derivative, and what is kept of it. lora: LoRA's products. scatter: sums over a token's routes.
// gradients: those of LoRA and of trained weights.
enum class Stage { kGather = 0, kGateUp, kActivation, kDown, kLora, kScatter, kGradients };
constexpr std::size_t kStages = 7;
const char* stage_name(Stage stage);

// Seconds. Stages that workers mix have the share of the wall clock that they have of the workers' time.
using StageTimes = std::array<double, kStages>;

}  // namespace kt_expert
