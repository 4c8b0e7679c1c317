#include <cmath>

#include "kt_expert/error.h"
#include "kt_expert/optimizer.h"

namespace kt_expert {
namespace {

constexpr const char* kNames[] = {"adamw", "adam", "sgd", "adafactor"};

bool is_step_slot(OptimizerKind kind, int slot) { return slot + 1 == OptimizerState::slot_count(kind); }

SlotShape shape_of(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind, int slot,
                   AdapterTensor tensor) {
  const TensorShape shape = tensor_shape(layer, lora, tensor);
  if (shape.rows == 0) return {};
  if (is_step_slot(kind, slot)) return {1, 1, 1};
  if (kind != OptimizerKind::kAdafactor) return {layer.experts, shape.rows, shape.columns};
  return slot == 0 ? SlotShape{layer.experts, shape.rows, 1} : SlotShape{layer.experts, 1, shape.columns};
}

MomentType type_of(OptimizerKind kind, MomentType moments, int slot) {
  return kind == OptimizerKind::kAdafactor || is_step_slot(kind, slot) ? MomentType::kF32 : moments;
}

std::int64_t slot_bytes(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind, MomentType moments,
                        int slot, AdapterTensor tensor) {
  return shape_of(layer, lora, kind, slot, tensor).size() * moment_bytes(type_of(kind, moments, slot));
}

}  // namespace

const char* optimizer_name(OptimizerKind kind) { return kNames[static_cast<int>(kind)]; }

OptimizerKind optimizer_from_name(const std::string& name) {
  std::string known;
  for (int kind = 0; kind < static_cast<int>(std::size(kNames)); ++kind) {
    if (name == kNames[kind]) return static_cast<OptimizerKind>(kind);
    known += (known.empty() ? "" : ", ") + std::string(kNames[kind]);
  }
  throw InvalidArgument("optimizer '" + name + "' is not known; choose one of: " + known);
}

void OptimizerUpdate::validate() const {
  const auto require = [&](bool holds, const char* what, double value) {
    if (!holds || !std::isfinite(value)) {
      throw InvalidArgument(std::string(optimizer_name(kind)) + " got " + what + " " + std::to_string(value));
    }
  };
  require(learning_rate >= 0.0, "lr, expected at least 0:", learning_rate);
  require(weight_decay >= 0.0, "weight_decay, expected at least 0:", weight_decay);
  if (kind == OptimizerKind::kSgd) {
    require(momentum >= 0.0, "momentum, expected at least 0:", momentum);
    require(true, "dampening, expected a finite number:", dampening);
    require(!nesterov || (momentum > 0.0 && dampening == 0.0),
            "nesterov, which needs momentum and no dampening:", momentum);
  } else if (kind == OptimizerKind::kAdafactor) {
    require(beta2_decay <= 0.0, "beta2_decay, expected at most 0:", beta2_decay);
    require(eps1 >= 0.0, "eps1, expected at least 0:", eps1);
    require(eps2 >= 0.0, "eps2, expected at least 0:", eps2);
    require(clip_threshold >= 1.0, "d, expected at least 1:", clip_threshold);
  } else {
    require(beta1 >= 0.0 && beta1 < 1.0, "beta1, expected 0 <= beta1 < 1:", beta1);
    require(beta2 >= 0.0 && beta2 < 1.0, "beta2, expected 0 <= beta2 < 1:", beta2);
    require(eps >= 0.0, "eps, expected at least 0:", eps);
  }
}

std::vector<std::string> OptimizerState::slot_names(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kSgd:
      return {"momentum_buffer", "step"};
    case OptimizerKind::kAdafactor:
      return {"row_var", "col_var", "step"};
    default:
      return {"exp_avg", "exp_avg_sq", "step"};
  }
}

OptimizerState::OptimizerState(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind, MomentType moments)
    : layer_(layer), spec_(lora), kind_(kind), moments_(moments) {
  for (int slot = 0; slot < slot_count(kind_); ++slot) {
    for (int t = 0; t < kAdapterTensors; ++t) {
      const AdapterTensor tensor = static_cast<AdapterTensor>(t);
      slots_[slot][t] = AlignedBuffer<std::uint8_t>(
          static_cast<std::size_t>(slot_bytes(layer_, spec_, kind_, moments_, slot, tensor)));
    }
  }
}

MomentType OptimizerState::slot_type(int slot) const { return type_of(kind_, moments_, slot); }

SlotShape OptimizerState::slot_shape(int slot, AdapterTensor tensor) const {
  return shape_of(layer_, spec_, kind_, slot, tensor);
}

std::int64_t OptimizerState::bytes() const { return bytes_of(layer_, spec_, kind_, moments_); }

std::int64_t OptimizerState::bytes_of(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind,
                                      MomentType moments) {
  std::int64_t total = 0;
  for (int slot = 0; slot < slot_count(kind); ++slot) {
    for (int t = 0; t < kAdapterTensors; ++t) {
      total += slot_bytes(layer, lora, kind, moments, slot, static_cast<AdapterTensor>(t));
    }
  }
  return total;
}

}  // namespace kt_expert
