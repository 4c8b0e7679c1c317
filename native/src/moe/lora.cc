#include "kt_expert/lora.h"

#include <cstring>
#include <string>

#include "kt_expert/error.h"

namespace kt_expert {
namespace {

constexpr int kMaxRank = 4096;
constexpr const char* kTensorNames[kLoraTensors] = {"a_gate", "b_gate", "a_up", "b_up", "a_down", "b_down"};

void require_rank(const char* name, int rank) {
  if (rank < 0 || rank > kMaxRank) {
    throw InvalidArgument(std::string("LoRA rank of ") + name + " is " + std::to_string(rank) +
                          ", expected a value in [0, " + std::to_string(kMaxRank) + "]");
  }
}

}  // namespace

const char* lora_tensor_name(LoraTensor tensor) { return kTensorNames[static_cast<int>(tensor)]; }

LoraTensor lora_tensor_from_name(const std::string& name) {
  std::string known;
  for (int t = 0; t < kLoraTensors; ++t) {
    if (name == kTensorNames[t]) return static_cast<LoraTensor>(t);
    known += (t == 0 ? "" : ", ") + std::string(kTensorNames[t]);
  }
  throw InvalidArgument("LoRA tensor '" + name + "' is not known; choose one of: " + known);
}

void LoraSpec::validate() const {
  require_rank("gate", rank_gate);
  require_rank("up", rank_up);
  require_rank("down", rank_down);
  if (!(dropout >= 0.0f && dropout < 1.0f)) {
    throw InvalidArgument("LoRA dropout is " + std::to_string(dropout) + ", expected a probability in [0, 1)");
  }
  if (tied && (rank_gate != rank_up || scale_gate != scale_up)) {
    throw InvalidArgument("tied LoRA needs one rank and one scale for gate and up, got ranks " +
                          std::to_string(rank_gate) + " and " + std::to_string(rank_up) + ", scales " +
                          std::to_string(scale_gate) + " and " + std::to_string(scale_up));
  }
}

LoraSpec LoraSpec::scaled(const LoraScales& scales) const {
  LoraSpec made = *this;
  made.scale_gate = scales.gate;
  made.scale_up = scales.up;
  made.scale_down = scales.down;
  made.validate();
  return made;
}

LoraShape lora_shape(const LayerSpec& layer, const LoraSpec& lora, LoraTensor tensor) {
  const auto present = [](int rank, LoraShape shape) { return rank > 0 ? shape : LoraShape{}; };
  switch (tensor) {
    case LoraTensor::kAGate:
      return present(lora.rank_gate, {lora.rank_gate, layer.hidden});
    case LoraTensor::kBGate:
      return present(lora.rank_gate, {layer.intermediate, lora.rank_gate});
    case LoraTensor::kAUp:
      return present(lora.tied ? 0 : lora.rank_up, {lora.rank_up, layer.hidden});
    case LoraTensor::kBUp:
      return present(lora.rank_up, {layer.intermediate, lora.rank_up});
    case LoraTensor::kADown:
      return present(lora.rank_down, {lora.rank_down, layer.intermediate});
    case LoraTensor::kBDown:
      return present(lora.rank_down, {layer.hidden, lora.rank_down});
  }
  return {};
}

LoraTensors::LoraTensors(const LayerSpec& layer, const LoraSpec& lora) : layer_(layer), lora_(lora) {
  layer_.validate();
  lora_.validate();
  for (int t = 0; t < kLoraTensors; ++t) {
    const LoraShape shape = lora_shape(layer, lora, static_cast<LoraTensor>(t));
    tensors_[static_cast<std::size_t>(t)] =
        AlignedBuffer<float>(static_cast<std::size_t>(layer.experts * shape.rows * shape.columns));
  }
}

const float* LoraTensors::expert(LoraTensor which, int expert) const {
  const LoraShape shape = lora_shape(layer_, lora_, which);
  return tensor(which).data() + expert * shape.rows * shape.columns;
}

float* LoraTensors::expert(LoraTensor which, int expert) {
  const LoraShape shape = lora_shape(layer_, lora_, which);
  return tensor(which).data() + expert * shape.rows * shape.columns;
}

void LoraTensors::zero() {
  for (AlignedBuffer<float>& tensor : tensors_) {
    if (!tensor.empty()) std::memset(tensor.data(), 0, tensor.size() * sizeof(float));
  }
}

std::int64_t LoraTensors::bytes() const {
  std::int64_t total = 0;
  for (const AlignedBuffer<float>& tensor : tensors_) total += static_cast<std::int64_t>(tensor.size() * sizeof(float));
  return total;
}

std::int64_t LoraTensors::bytes_of(const LayerSpec& layer, const LoraSpec& lora) {
  std::int64_t floats = 0;
  for (int t = 0; t < kLoraTensors; ++t) {
    const LoraShape shape = lora_shape(layer, lora, static_cast<LoraTensor>(t));
    floats += layer.experts * shape.rows * shape.columns;
  }
  return floats * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace kt_expert
