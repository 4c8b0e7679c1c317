// What is trained of one layer, LoRA or the weights themselves: parameters, gradients and moments have this one shape.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/layer.h"

namespace kt_expert {

// Of LoRA.
struct AdapterScales {
  float gate = 0.0f;
  float up = 0.0f;
  float down = 0.0f;
};

// Rank 0 leaves a projection without LoRA. Tied: gate and up share A_gate (PEFT's form for a fused gate_up parameter),
// so their ranks are equal. scale is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA. Full: no LoRA, but the
// layer's weights and biases.
struct AdapterSpec {
  bool tied = false;
  int rank_gate = 0;
  int rank_up = 0;
  int rank_down = 0;
  float scale_gate = 0.0f;
  float scale_up = 0.0f;
  float scale_down = 0.0f;
  float dropout = 0.0f;  // probability to drop a value of LoRA's input, x (one mask for gate and up) or h, in training
  bool full = false;

  void validate() const;
  // Whether there is LoRA.
  bool any() const { return rank_gate > 0 || rank_up > 0 || rank_down > 0; }
  // The same with other scales. Throws InvalidArgument where tied projections get two.
  AdapterSpec scaled(const AdapterScales& scales) const;
};

// The layer's weights and biases.
inline AdapterSpec full_weights() {
  AdapterSpec spec;
  spec.full = true;
  return spec;
}

enum class AdapterTensor {
  kAGate = 0,
  kBGate = 1,
  kAUp = 2,
  kBUp = 3,
  kADown = 4,
  kBDown = 5,
  kWGate = 6,
  kWUp = 7,
  kWDown = 8,
  kBiasGate = 9,
  kBiasUp = 10,
  kBiasDown = 11
};
constexpr int kLoraTensors = 6;  // those of LoRA come first
constexpr int kAdapterTensors = 12;
// A set of them: one bit each.
using AdapterTensorSet = unsigned;
constexpr AdapterTensorSet kAllAdapterTensors = (1u << kAdapterTensors) - 1;
constexpr bool contains(AdapterTensorSet set, AdapterTensor tensor) {
  return ((set >> static_cast<int>(tensor)) & 1u) != 0;
}
// a_gate, b_gate, a_up, b_up, a_down, b_down, w_gate, w_up, w_down, bias_gate, bias_up, bias_down
const char* adapter_tensor_name(AdapterTensor tensor);
// Throws InvalidArgument for a name that is not one of those.
AdapterTensor adapter_tensor_from_name(const std::string& name);

struct TensorShape {
  std::int64_t rows = 0;  // per expert
  std::int64_t columns = 0;
};

// Shape of one expert's matrix: A_gate, A_up [r, H]; B_gate, B_up [I, r]; A_down [r, I]; B_down [H, r]; W_gate, W_up
// [I, H]; W_down [H, I]; biases [1, I], [1, I] and [1, H]. Absent: 0 x 0.
TensorShape tensor_shape(const LayerSpec& layer, const AdapterSpec& lora, AdapterTensor tensor);

class AdapterTensors {
 public:
  AdapterTensors(const LayerSpec& layer, const AdapterSpec& lora);

  const LayerSpec& layer() const { return layer_; }
  const AdapterSpec& spec() const { return spec_; }
  AlignedBuffer<float>& tensor(AdapterTensor which) { return tensors_[static_cast<std::size_t>(which)]; }
  const AlignedBuffer<float>& tensor(AdapterTensor which) const { return tensors_[static_cast<std::size_t>(which)]; }
  const float* expert(AdapterTensor which, int expert) const;
  float* expert(AdapterTensor which, int expert);
  void zero();
  std::int64_t bytes() const;
  static std::int64_t bytes_of(const LayerSpec& layer, const AdapterSpec& lora);

  // The tensor that plays A for up: A_gate where tied.
  AdapterTensor a_up() const { return spec_.tied ? AdapterTensor::kAGate : AdapterTensor::kAUp; }

 private:
  LayerSpec layer_;
  AdapterSpec spec_;
  std::array<AlignedBuffer<float>, kAdapterTensors> tensors_;
};

}  // namespace kt_expert
