// LoRA gradients: dB = d_out^T (scale * in A^T) and dA = (scale * d_out B)^T in, summed over one expert's rows.
#include <algorithm>

#include "moe/backward.h"

namespace kt_expert {

OuterRows Engine::BackwardPass::d_hidden_rows(const OperandRows& operands, const float* f32, std::int64_t first) const {
  if (f32 != nullptr) return {f32 + first * layer_.intermediate, layer_.intermediate, nullptr};
  return {operands.f32() + first * operands.stride, operands.stride, nullptr};
}

// Of every expert: those without a row in this batch held something too.
void Engine::BackwardPass::clear_gradients() {
  if ((args_.wanted & args_.replaced) == 0) return;
  pool_.run(kLoraTensors * std::int64_t{layer_.experts}, [&](std::int64_t task, int) {
    const LoraTensor tensor = static_cast<LoraTensor>(task % kLoraTensors);
    const LoraShape shape = lora_shape(layer_, lora_, tensor);
    if (shape.rows == 0 || !contains(args_.wanted & args_.replaced, tensor)) return;
    std::fill_n(args_.gradients->expert(tensor, static_cast<int>(task / kLoraTensors)), shape.rows * shape.columns,
                0.0f);
  });
}

// One owner per (expert, tensor), rows in token order: no atomics, and the same bits for any number of workers. Where
// gate and up share A, their contributions were summed before.
void Engine::BackwardPass::lora_gradients() {
  if (!lora_.any()) return;
  pool_.run(kLoraTensors * static_cast<std::int64_t>(routing_.active.size()), [&](std::int64_t task, int) {
    lora_gradient(routing_.active[static_cast<std::size_t>(task / kLoraTensors)],
                  static_cast<LoraTensor>(task % kLoraTensors));
  });
}

void Engine::BackwardPass::lora_gradient(int expert, LoraTensor tensor) {
  const LoraShape shape = lora_shape(layer_, lora_, tensor);
  if (shape.rows == 0 || !contains(args_.wanted, tensor)) return;
  const std::int64_t first = routing_.begin_of(expert);
  const std::int32_t* tokens = routing_.row_token.data() + first;
  const auto kept = [&](const float* rows, int rank) {
    return OuterRows{rows + first * rank_stride(rank), rank_stride(rank), nullptr};
  };
  const OuterRows x{x_.base, x_.stride, tokens}, dy{dy_.base, dy_.stride, tokens};
  OuterRows left, right;
  switch (tensor) {
    case LoraTensor::kAGate:
      left = buffers_.d_gate_b.outer(first), right = x;
      break;
    case LoraTensor::kBGate:
      left = d_hidden_rows(buffers_.d_gate, buffers_.d_gate_f32, first);
      right = kept(saved_.x_a_gate, lora_.rank_gate);
      break;
    case LoraTensor::kAUp:
      left = buffers_.d_up_b.outer(first), right = x;
      break;
    case LoraTensor::kBUp:
      left = d_hidden_rows(buffers_.d_up, buffers_.d_up_f32, first);
      right = kept(lora_.tied ? saved_.x_a_gate : saved_.x_a_up, lora_.rank_up);
      break;
    case LoraTensor::kADown:
      left = buffers_.dy_b_down.outer(first);
      right = {buffers_.h_f32 + first * layer_.intermediate, layer_.intermediate, nullptr};
      break;
    case LoraTensor::kBDown:
      left = dy, right = kept(buffers_.weighted_h_a, lora_.rank_down);
      break;
  }
  kernels_.outer(left, right, routing_.rows_of(expert), static_cast<int>(shape.rows), static_cast<int>(shape.columns),
                 args_.gradients->expert(tensor, expert), shape.columns);
}

}  // namespace kt_expert
