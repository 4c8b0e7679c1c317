// Optimizers over fp32 master parameters: which there are, what one step is told, and the state they keep.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kt_expert/adapter.h"
#include "kt_expert/aligned_buffer.h"

namespace kt_expert {

//   adamw      Loshchilov & Hutter, arXiv:1711.05101: weight decay apart from the gradient
//   adam       Kingma & Ba, arXiv:1412.6980: weight decay added to the gradient (L2)
//   sgd        with momentum, dampening and Nesterov's form as in torch.optim.SGD
//   adafactor  Shazeer & Stern, arXiv:1804.04235, as in torch.optim.Adafactor: second moments as a row and a column
//              vector; every expert's matrix is a parameter of its own
enum class OptimizerKind { kAdamW = 0, kAdam = 1, kSgd = 2, kAdafactor = 3 };
const char* optimizer_name(OptimizerKind kind);
// Throws InvalidArgument for a name that is not one of the above.
OptimizerKind optimizer_from_name(const std::string& name);

// Moments of the size of the parameters may be kept in bf16. They are rounded at random, by a generator that counts
// elements and steps: to nearest, a second moment would stop moving once its change is below half its last bit.
enum class MomentType { kF32 = 0, kBf16 = 1 };
constexpr int kMomentTypes = 2;
constexpr int moment_bytes(MomentType type) { return type == MomentType::kF32 ? 4 : 2; }

// Hyper-parameters of one step for one group of tensors, with torch's names and meanings. Fields another kind uses are
// ignored.
struct OptimizerUpdate {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double learning_rate = 0.0;
  double weight_decay = 0.0;
  double beta1 = 0.9;  // adam, adamw
  double beta2 = 0.999;
  double eps = 1e-8;
  double momentum = 0.0;  // sgd
  double dampening = 0.0;
  bool nesterov = false;
  double beta2_decay = -0.8;  // adafactor
  double eps1 = 1.1920928955078125e-7;
  double eps2 = 1e-3;
  double clip_threshold = 1.0;  // torch's d

  // Throws InvalidArgument for numbers the method is not defined for.
  void validate() const;
};

struct TensorStep {
  OptimizerUpdate update;
  double grad_scale = 1.0;  // clip coefficient and averaging, applied to the gradient first
};

// What becomes of each of a layer's tensors; those without an entry stay as they are.
struct LayerStep {
  std::array<std::optional<TensorStep>, kAdapterTensors> tensors;

  const std::optional<TensorStep>& of(AdapterTensor tensor) const { return tensors[static_cast<std::size_t>(tensor)]; }
};

// Of all experts together.
struct SlotShape {
  std::int64_t experts = 0;
  std::int64_t rows = 0;
  std::int64_t columns = 0;

  std::int64_t size() const { return experts * rows * columns; }
};

// What one layer's optimizer keeps between steps, zero at first. Slots: exp_avg and exp_avg_sq (adamw, adam),
// momentum_buffer (sgd), row_var and col_var (adafactor; [experts, rows, 1] and [experts, 1, columns], always fp32);
// and last, for every kind, step: how many updates these moments of a tensor stand for, as one fp32 number like
// torch's.
class OptimizerState {
 public:
  static constexpr int kMostSlots = 3;

  OptimizerState(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind, MomentType moments);

  OptimizerKind kind() const { return kind_; }
  MomentType moments() const { return moments_; }
  const LayerSpec& layer() const { return layer_; }
  const AdapterSpec& spec() const { return spec_; }
  static std::vector<std::string> slot_names(OptimizerKind kind);
  static int slot_count(OptimizerKind kind) { return kind == OptimizerKind::kSgd ? 2 : kMostSlots; }
  MomentType slot_type(int slot) const;
  // Shape of one slot of one tensor; rows or columns are 1 where they are factored away.
  SlotShape slot_shape(int slot, AdapterTensor tensor) const;
  std::uint8_t* data(int slot, AdapterTensor tensor) { return slots_[slot][static_cast<std::size_t>(tensor)].data(); }
  // Counted per tensor, because a layer may see no gradient for some steps, and a momentum buffer begins only once
  // there is momentum. Exact up to 2^24. Only for tensors that are there.
  float& steps(AdapterTensor tensor) { return *reinterpret_cast<float*>(data(slot_count(kind_) - 1, tensor)); }
  std::int64_t bytes() const;
  static std::int64_t bytes_of(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind, MomentType moments);

 private:
  LayerSpec layer_;
  AdapterSpec spec_;
  OptimizerKind kind_;
  MomentType moments_;
  std::array<std::array<AlignedBuffer<std::uint8_t>, kAdapterTensors>, kMostSlots> slots_;
};

}  // namespace kt_expert
