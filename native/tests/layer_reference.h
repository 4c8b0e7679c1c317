// One MoE layer with LoRA in double precision: forward and every gradient, written from the formulas with plain loops.
#pragma once

#include <string>
#include <vector>

#include "kt_expert/engine.h"

namespace kt_expert {

using Matrix = std::vector<double>;  // row-major

struct LayerCase {
  std::string name;
  LayerSpec layer;
  AdapterSpec lora;
  int tokens = 0;
  int top_k = 0;
  WeightFormat format = WeightFormat::kBf16;
  int used_experts = 0;  // routes go to the first of them only; 0: all
};

// Inputs of one case. Weights as they lie in memory, LoRA and tokens exactly representable in bf16.
struct LayerInputs {
  LayerCase spec;
  std::vector<std::vector<bf16_t>> weights[kProjections];  // [E][rows * columns]
  std::vector<float> biases[kProjections];                 // [E * rows]
  std::vector<float> adapter[kLoraTensors];                // [E * rows * columns]
  std::vector<float> x, dy;                                // [tokens * H]
  std::vector<std::int32_t> ids;                           // [tokens * k]
  std::vector<float> route_weights;
};
LayerInputs make_inputs(const LayerCase& spec, unsigned seed);
// The same weights and adapter with some of the tokens.
LayerInputs select_tokens(const LayerInputs& inputs, int first, int count);

struct LayerResult {
  Matrix y, dx, d_weights;
  Matrix gradients[kAdapterTensors];
};

// `weights` decides what the dense weights are: what the engine's formats decode to, rounded to bf16 where the ISA
// multiplies bf16.
LayerResult reference(const LayerInputs& inputs, const LayerWeights& weights, bool bf16_operands);

LayerWeights load_weights(const LayerInputs& inputs, int nodes);
AdapterTensors load_adapter(const LayerInputs& inputs);
LayerResult run_engine(Engine& engine, const LayerInputs& inputs, FloatType type, SavePolicy policy);
// Batches of the first one's layer, in one pass.
std::vector<LayerResult> run_together(Engine& engine, const std::vector<LayerInputs>& batches, FloatType type,
                                      SavePolicy policy);

// Relative L2; the absolute norm where nothing is expected.
double relative_error(const Matrix& got, const Matrix& expected);
struct WorstError {
  double error = 0.0;
  std::string quantity;
};
// Of y, dx, d_weights and every gradient of LoRA and of weights.
WorstError worst_error(const LayerResult& got, const LayerResult& expected);
bool same_bits(const LayerResult& left, const LayerResult& right);

}  // namespace kt_expert
