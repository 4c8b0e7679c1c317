// LoRA gradients: dB = d_out^T (scale * in A^T) and dA = (scale * d_out B)^T in; those of weights: dW = d_out^T in. All
// summed over one expert's rows.
#include <algorithm>
#include <utility>

#include "moe/backward.h"

namespace kt_expert {
namespace {

constexpr int kWeightTensors = kAdapterTensors - kLoraTensors;
// Of one task: a tile of the kernel is a few rows, and the least loaded expert's matrix must not hold up the others.
constexpr std::int64_t kRowsOfTask = 64;

AdapterTensor weight_tensor(std::int64_t index) { return static_cast<AdapterTensor>(kLoraTensors + index); }

}  // namespace

OuterRows Engine::BackwardPass::d_hidden_rows(const OperandRows& operands, const float* f32, std::int64_t first,
                                              std::int64_t shared) const {
  if (f32 != nullptr) return {f32 + first * layer_.intermediate, layer_.intermediate, nullptr};
  return {operands.f32() + shared * operands.stride, operands.stride, nullptr};
}

// Of every expert: those without a row in this batch held something too.
void Engine::BackwardPass::clear_gradients(std::size_t batch) {
  const BackwardArgs& args = args_[batch];
  const AdapterTensorSet cleared = args.wanted & args.replaced;
  if (cleared == 0) return;
  pool_.run(kAdapterTensors * std::int64_t{layer_.experts}, [&](std::int64_t task, int) {
    const AdapterTensor tensor = static_cast<AdapterTensor>(task % kAdapterTensors);
    AdapterTensors* gradients = task % kAdapterTensors < kLoraTensors ? args.gradients : args.weight_gradients;
    if (gradients == nullptr || !contains(cleared, tensor)) return;
    const TensorShape shape = tensor_shape(layer_, gradients->spec(), tensor);
    if (shape.rows == 0) return;
    std::fill_n(gradients->expert(tensor, static_cast<int>(task / kAdapterTensors)), shape.rows * shape.columns, 0.0f);
  });
}

std::vector<Engine::BackwardPass::BatchExpert> Engine::BackwardPass::with_lora_gradients() const {
  std::vector<BatchExpert> matrices;
  for (std::size_t b = 0; b < batches_.size(); ++b) {
    if (!batches_[b].lora.any() || args_[b].gradients == nullptr) continue;
    for (const std::int32_t expert : batches_[b].routing->active) matrices.push_back({b, expert});
  }
  return matrices;
}

// One owner per (batch, expert, tensor), rows in token order: no atomics, and the same bits for any number of workers.
// Where gate and up share A, their contributions were summed before.
void Engine::BackwardPass::lora_gradients(const std::vector<BatchExpert>& matrices) {
  pool_.run(kLoraTensors * static_cast<std::int64_t>(matrices.size()), [&](std::int64_t task, int) {
    const auto [batch, expert] = matrices[static_cast<std::size_t>(task / kLoraTensors)];
    lora_gradient(batch, expert, static_cast<AdapterTensor>(task % kLoraTensors));
  });
}

void Engine::BackwardPass::lora_gradient(std::size_t batch, int expert, AdapterTensor tensor) {
  const BackwardArgs& args = args_[batch];
  const OwnBuffers& own = buffers_.own[batch];
  const AdapterSpec& lora = batches_[batch].lora;
  const Routing& routing = *batches_[batch].routing;
  const TensorShape shape = tensor_shape(layer_, lora, tensor);
  if (shape.rows == 0 || !contains(args.wanted, tensor)) return;
  const std::int64_t first = routing.begin_of(expert), shared = plan_.shared_row(batch, expert);
  const std::int32_t* tokens = routing.row_token.data() + first;
  const auto kept = [&](const float* rows, int rank) {
    return OuterRows{rows + first * rank_stride(rank), rank_stride(rank), nullptr};
  };
  const OuterRows x{own.x.base, own.x.stride, tokens}, dy{own.dy.base, own.dy.stride, tokens};
  OuterRows left, right;
  switch (tensor) {
    case AdapterTensor::kAGate:
      left = own.d_gate_b.outer(first), right = x;
      break;
    case AdapterTensor::kBGate:
      left = d_hidden_rows(buffers_.d_gate, own.d_gate_f32, first, shared);
      right = kept(own.saved.x_a_gate, lora.rank_gate);
      break;
    case AdapterTensor::kAUp:
      left = own.d_up_b.outer(first), right = x;
      break;
    case AdapterTensor::kBUp:
      left = d_hidden_rows(buffers_.d_up, own.d_up_f32, first, shared);
      right = kept(lora.tied ? own.saved.x_a_gate : own.saved.x_a_up, lora.rank_up);
      break;
    case AdapterTensor::kADown:
      left = own.dy_b_down.outer(first);
      right = {own.h_f32 + first * layer_.intermediate, layer_.intermediate, nullptr};
      break;
    case AdapterTensor::kBDown:
      left = dy, right = kept(own.weighted_h_a, lora.rank_down);
      break;
    default:
      return;
  }
  kernels_.outer(left, right, routing.rows_of(expert), static_cast<int>(shape.rows), static_cast<int>(shape.columns),
                 args.gradients->expert(tensor, expert), shape.columns);
}

void Engine::BackwardPass::weight_gradients(std::size_t batch) {
  if (!trains_weights(batch)) return;
  const AdapterSpec& spec = args_[batch].weight_gradients->spec();
  const std::vector<std::int32_t>& active = batches_[batch].routing->active;
  std::int64_t ends[kWeightTensors], tasks = 0;  // of one expert
  for (int t = 0; t < kWeightTensors; ++t) {
    const std::int64_t rows = tensor_shape(layer_, spec, weight_tensor(t)).rows;
    tasks += ceil_div(rows, kRowsOfTask);
    ends[t] = tasks;
  }
  pool_.run(tasks * static_cast<std::int64_t>(active.size()), [&](std::int64_t task, int) {
    const std::int64_t in_expert = task % tasks;
    const std::int64_t t = std::upper_bound(ends, ends + kWeightTensors, in_expert) - ends;
    weight_gradient(batch, active[static_cast<std::size_t>(task / tasks)], weight_tensor(t),
                    (in_expert - (t == 0 ? 0 : ends[t - 1])) * kRowsOfTask);
  });
}

// Some rows of one expert's matrix.
void Engine::BackwardPass::weight_gradient(std::size_t batch, int expert, AdapterTensor tensor,
                                           std::int64_t first_row) {
  const BackwardArgs& args = args_[batch];
  const OwnBuffers& own = buffers_.own[batch];
  const Routing& routing = *batches_[batch].routing;
  if (!contains(args.wanted, tensor)) return;
  const TensorShape shape = tensor_shape(layer_, args.weight_gradients->spec(), tensor);
  const std::int64_t first = routing.begin_of(expert), shared = plan_.shared_row(batch, expert);
  const std::int32_t* tokens = routing.row_token.data() + first;
  const float one = 1.0f;
  const OuterRows ones{&one, 0, nullptr}, x{own.whole_x.base, own.whole_x.stride, tokens},
      dy{own.dy.base, own.dy.stride, tokens};
  const OuterRows d_up = d_hidden_rows(buffers_.d_up, own.d_up_f32, first, shared);
  OuterRows left, right;
  switch (tensor) {
    case AdapterTensor::kWGate:
      left = d_hidden_rows(buffers_.d_gate, own.d_gate_f32, first, shared), right = x;
      break;
    case AdapterTensor::kWUp:
      left = d_up, right = x;
      break;
    case AdapterTensor::kWDown:
      left = dy, right = {own.weighted_h + first * layer_.intermediate, layer_.intermediate, nullptr};
      break;
    case AdapterTensor::kBiasGate:
      left = ones, right = d_hidden_rows(buffers_.d_gate, own.d_gate_f32, first, shared);
      break;
    case AdapterTensor::kBiasUp:
      left = ones, right = d_up;
      break;
    default:
      left = {routing.row_weight.data() + first, 1, nullptr}, right = dy;
      break;
  }
  left.base += first_row;
  const std::int64_t rows = std::min(kRowsOfTask, shape.rows - first_row);
  kernels_.outer(left, right, routing.rows_of(expert), static_cast<int>(rows), static_cast<int>(shape.columns),
                 args.weight_gradients->expert(tensor, expert) + first_row * shape.columns, shape.columns);
}

}  // namespace kt_expert
