// LoRA tensors of one layer: parameters, gradients and moments all have this one shape.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/layer.h"

namespace kt_expert {

struct LoraScales {
  float gate = 0.0f;
  float up = 0.0f;
  float down = 0.0f;
};

// Rank 0 leaves a projection without LoRA. Tied: gate and up share A_gate (PEFT's form for a fused gate_up parameter),
// so their ranks are equal. scale is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
struct LoraSpec {
  bool tied = false;
  int rank_gate = 0;
  int rank_up = 0;
  int rank_down = 0;
  float scale_gate = 0.0f;
  float scale_up = 0.0f;
  float scale_down = 0.0f;
  float dropout = 0.0f;  // probability to drop a value of LoRA's input, x (one mask for gate and up) or h, in training

  void validate() const;
  bool any() const { return rank_gate > 0 || rank_up > 0 || rank_down > 0; }
  // The same with other scales. Throws InvalidArgument where tied projections get two.
  LoraSpec scaled(const LoraScales& scales) const;
};

enum class LoraTensor { kAGate = 0, kBGate = 1, kAUp = 2, kBUp = 3, kADown = 4, kBDown = 5 };
constexpr int kLoraTensors = 6;
// A set of them: one bit each.
using LoraTensorSet = unsigned;
constexpr LoraTensorSet kAllLoraTensors = (1u << kLoraTensors) - 1;
constexpr bool contains(LoraTensorSet set, LoraTensor tensor) { return ((set >> static_cast<int>(tensor)) & 1u) != 0; }
const char* lora_tensor_name(LoraTensor tensor);  // a_gate, b_gate, a_up, b_up, a_down, b_down
// Throws InvalidArgument for a name that is not one of those.
LoraTensor lora_tensor_from_name(const std::string& name);

struct LoraShape {
  std::int64_t rows = 0;  // per expert
  std::int64_t columns = 0;
};

// Shape of one expert's matrix: A_gate, A_up [r, H]; B_gate, B_up [I, r]; A_down [r, I]; B_down [H, r]. Absent: 0 x 0.
LoraShape lora_shape(const LayerSpec& layer, const LoraSpec& lora, LoraTensor tensor);

class LoraTensors {
 public:
  LoraTensors(const LayerSpec& layer, const LoraSpec& lora);

  const LayerSpec& layer() const { return layer_; }
  const LoraSpec& lora() const { return lora_; }
  AlignedBuffer<float>& tensor(LoraTensor which) { return tensors_[static_cast<std::size_t>(which)]; }
  const AlignedBuffer<float>& tensor(LoraTensor which) const { return tensors_[static_cast<std::size_t>(which)]; }
  const float* expert(LoraTensor which, int expert) const;
  float* expert(LoraTensor which, int expert);
  void zero();
  std::int64_t bytes() const;
  static std::int64_t bytes_of(const LayerSpec& layer, const LoraSpec& lora);

  // The tensor that plays A for up: A_gate where tied.
  LoraTensor a_up() const { return lora_.tied ? LoraTensor::kAGate : LoraTensor::kAUp; }

 private:
  LayerSpec layer_;
  LoraSpec lora_;
  std::array<AlignedBuffer<float>, kLoraTensors> tensors_;
};

}  // namespace kt_expert
