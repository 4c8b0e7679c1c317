#include "kt_expert/adapter.h"

#include <cstring>
#include <string>

#include "kt_expert/error.h"

namespace kt_expert {
namespace {

constexpr int kMaxRank = 4096;
constexpr const char* kTensorNames[kAdapterTensors] = {"a_gate", "b_gate",    "a_up",    "b_up",
                                                       "a_down", "b_down",    "w_gate",  "w_up",
                                                       "w_down", "bias_gate", "bias_up", "bias_down"};

void require_rank(const char* name, int rank) {
  if (rank < 0 || rank > kMaxRank) {
    throw InvalidArgument(std::string("LoRA rank of ") + name + " is " + std::to_string(rank) +
                          ", expected a value in [0, " + std::to_string(kMaxRank) + "]");
  }
}

}  // namespace

const char* adapter_tensor_name(AdapterTensor tensor) { return kTensorNames[static_cast<int>(tensor)]; }

AdapterTensor adapter_tensor_from_name(const std::string& name) {
  std::string known;
  for (int t = 0; t < kAdapterTensors; ++t) {
    if (name == kTensorNames[t]) return static_cast<AdapterTensor>(t);
    known += (t == 0 ? "" : ", ") + std::string(kTensorNames[t]);
  }
  throw InvalidArgument("tensor '" + name + "' is not known; choose one of: " + known);
}

void AdapterSpec::validate() const {
  require_rank("gate", rank_gate);
  require_rank("up", rank_up);
  require_rank("down", rank_down);
  if (!(dropout >= 0.0f && dropout < 1.0f)) {
    throw InvalidArgument("LoRA dropout is " + std::to_string(dropout) + ", expected a probability in [0, 1)");
  }
  if (full && any()) {
    throw InvalidArgument("a layer is trained in full or by LoRA, got both; use two adapters");
  }
  if (tied && (rank_gate != rank_up || scale_gate != scale_up)) {
    throw InvalidArgument("tied LoRA needs one rank and one scale for gate and up, got ranks " +
                          std::to_string(rank_gate) + " and " + std::to_string(rank_up) + ", scales " +
                          std::to_string(scale_gate) + " and " + std::to_string(scale_up));
  }
}

AdapterSpec AdapterSpec::scaled(const AdapterScales& scales) const {
  AdapterSpec made = *this;
  made.scale_gate = scales.gate;
  made.scale_up = scales.up;
  made.scale_down = scales.down;
  made.validate();
  return made;
}

TensorShape tensor_shape(const LayerSpec& layer, const AdapterSpec& lora, AdapterTensor tensor) {
  const auto present = [](int rank, TensorShape shape) { return rank > 0 ? shape : TensorShape{}; };
  const auto weight = [&](bool there, std::int64_t rows, std::int64_t columns) {
    return lora.full && there ? TensorShape{rows, columns} : TensorShape{};
  };
  const bool gated = has_gate(layer.activation.kind);
  switch (tensor) {
    case AdapterTensor::kAGate:
      return present(lora.rank_gate, {lora.rank_gate, layer.hidden});
    case AdapterTensor::kBGate:
      return present(lora.rank_gate, {layer.intermediate, lora.rank_gate});
    case AdapterTensor::kAUp:
      return present(lora.tied ? 0 : lora.rank_up, {lora.rank_up, layer.hidden});
    case AdapterTensor::kBUp:
      return present(lora.rank_up, {layer.intermediate, lora.rank_up});
    case AdapterTensor::kADown:
      return present(lora.rank_down, {lora.rank_down, layer.intermediate});
    case AdapterTensor::kBDown:
      return present(lora.rank_down, {layer.hidden, lora.rank_down});
    case AdapterTensor::kWGate:
      return weight(gated, layer.intermediate, layer.hidden);
    case AdapterTensor::kWUp:
      return weight(true, layer.intermediate, layer.hidden);
    case AdapterTensor::kWDown:
      return weight(true, layer.hidden, layer.intermediate);
    case AdapterTensor::kBiasGate:
      return weight(gated && layer.has_bias, 1, layer.intermediate);
    case AdapterTensor::kBiasUp:
      return weight(layer.has_bias, 1, layer.intermediate);
    case AdapterTensor::kBiasDown:
      return weight(layer.has_bias, 1, layer.hidden);
  }
  return {};
}

AdapterTensors::AdapterTensors(const LayerSpec& layer, const AdapterSpec& lora) : layer_(layer), spec_(lora) {
  layer_.validate();
  spec_.validate();
  for (int t = 0; t < kAdapterTensors; ++t) {
    const TensorShape shape = tensor_shape(layer, lora, static_cast<AdapterTensor>(t));
    tensors_[static_cast<std::size_t>(t)] =
        AlignedBuffer<float>(static_cast<std::size_t>(layer.experts * shape.rows * shape.columns));
  }
}

const float* AdapterTensors::expert(AdapterTensor which, int expert) const {
  const TensorShape shape = tensor_shape(layer_, spec_, which);
  return tensor(which).data() + expert * shape.rows * shape.columns;
}

float* AdapterTensors::expert(AdapterTensor which, int expert) {
  const TensorShape shape = tensor_shape(layer_, spec_, which);
  return tensor(which).data() + expert * shape.rows * shape.columns;
}

void AdapterTensors::zero() {
  for (AlignedBuffer<float>& tensor : tensors_) {
    if (!tensor.empty()) std::memset(tensor.data(), 0, tensor.size() * sizeof(float));
  }
}

std::int64_t AdapterTensors::bytes() const {
  std::int64_t total = 0;
  for (const AlignedBuffer<float>& tensor : tensors_) total += static_cast<std::int64_t>(tensor.size() * sizeof(float));
  return total;
}

std::int64_t AdapterTensors::bytes_of(const LayerSpec& layer, const AdapterSpec& lora) {
  std::int64_t floats = 0;
  for (int t = 0; t < kAdapterTensors; ++t) {
    const TensorShape shape = tensor_shape(layer, lora, static_cast<AdapterTensor>(t));
    floats += layer.experts * shape.rows * shape.columns;
  }
  return floats * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace kt_expert
