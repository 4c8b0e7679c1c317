// The fused optimizer step: ranks are summed, averaged, clipped and applied in one sweep over memory.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm/kernels.h"
#include "kt_expert/engine.h"
#include "kt_expert/error.h"

namespace kt_expert {
namespace {

constexpr std::int64_t kSpanFloats = 16 * 1024;  // 64 KiB a stream: a handful of streams fit in L2

// Sum over ranks of one span, in rank order: the first rank's own memory where there is only one.
const float* sum_ranks(const KernelTable& kernels, const std::vector<const LoraTensors*>& gradients, LoraTensor which,
                       std::int64_t first, std::int64_t count, std::vector<float>& buffer) {
  const float* own = gradients.front()->tensor(which).data() + first;
  if (gradients.size() == 1) return own;
  buffer.assign(own, own + count);
  for (std::size_t rank = 1; rank < gradients.size(); ++rank) {
    kernels.add_scaled(1.0f, gradients[rank]->tensor(which).data() + first, buffer.data(), count);
  }
  return buffer.data();
}

struct SpanOf {
  LoraTensor tensor;
  std::int64_t first;
  std::int64_t count;
};

std::vector<SpanOf> spans_of(const LoraTensors& tensors) {
  std::vector<SpanOf> spans;
  for (int t = 0; t < kLoraTensors; ++t) {
    const LoraTensor which = static_cast<LoraTensor>(t);
    const std::int64_t size = static_cast<std::int64_t>(tensors.tensor(which).size());
    for (std::int64_t first = 0; first < size; first += kSpanFloats) {
      spans.push_back({which, first, std::min(kSpanFloats, size - first)});
    }
  }
  return spans;
}

}  // namespace

namespace {

// Tells tensors and steps apart in the rounding of bf16 moments.
std::uint32_t rounding_seed(std::int64_t step, LoraTensor tensor) {
  return static_cast<std::uint32_t>(step) * 0x9E3779B1u + static_cast<std::uint32_t>(tensor) * 0x27D4EB2Fu;
}

AdamStep adam_step(const OptimizerUpdate& update, const OptimizerStep& step, LoraTensor tensor) {
  const double count = static_cast<double>(step.step);
  return {update.learning_rate,
          update.beta1,
          update.beta2,
          update.eps,
          update.weight_decay,
          step.grad_scale,
          1.0 - std::pow(update.beta1, count),
          1.0 - std::pow(update.beta2, count),
          update.kind == OptimizerKind::kAdamW,
          rounding_seed(step.step, tensor)};
}

SgdStep sgd_step(const OptimizerUpdate& update, const OptimizerStep& step, LoraTensor tensor, bool first) {
  const double dampening = update.momentum == 0.0 ? 0.0 : update.dampening;  // dampens a buffer, and there is none
  return {update.learning_rate, update.momentum, dampening, update.weight_decay,
          step.grad_scale,      update.nesterov, first,     rounding_seed(step.step, tensor)};
}

// One expert's matrix, as torch.optim.Adafactor treats a parameter.
struct FactoredMatrix {
  std::int64_t rows, columns;
  const float* gradient;  // summed over ranks, not scaled
  float* parameter;
  float* row_var;
  float* col_var;
};

void factored_step(const KernelTable& kernels, const OptimizerUpdate& update, const OptimizerStep& step,
                   const FactoredMatrix& matrix, std::vector<float>& buffer) {
  const std::int64_t rows = matrix.rows, columns = matrix.columns, size = rows * columns;
  const double count = static_cast<double>(step.step), elements = static_cast<double>(size);
  const float fresh = static_cast<float>(std::pow(count, update.beta2_decay));
  buffer.assign(static_cast<std::size_t>(size + columns), 0.0f);
  float *gradient = buffer.data(), *column_squares = buffer.data() + size;
  kernels.add_scaled(static_cast<float>(step.grad_scale), matrix.gradient, gradient, size);
  double row_sum = 0.0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* line = gradient + i * columns;
    const float mean = static_cast<float>(kernels.sum_squares(line, columns) / static_cast<double>(columns));
    matrix.row_var[i] += fresh * (mean - matrix.row_var[i]);
    row_sum += matrix.row_var[i];
    kernels.add_squares(line, column_squares, columns);
  }
  kernels.scale(1.0f - fresh, matrix.col_var, columns);
  kernels.add_scaled(fresh / static_cast<float>(rows), column_squares, matrix.col_var, columns);
  const double row_mean = std::max(row_sum / static_cast<double>(rows), update.eps1);
  const float least = static_cast<float>(update.eps1 * update.eps1);
  double update_squares = 0.0;
  for (std::int64_t i = 0; i < rows; ++i) {
    float* line = gradient + i * columns;
    const float row = static_cast<float>(matrix.row_var[i] / row_mean);
    kernels.factored_update(row, matrix.col_var, least, line, line, columns);
    update_squares += kernels.sum_squares(line, columns);
  }
  const double rate = std::min(update.learning_rate, 1.0 / std::sqrt(count));
  const double size_of_parameter = std::sqrt(kernels.sum_squares(matrix.parameter, size) / elements);
  const double size_of_update = std::sqrt(update_squares / elements) / update.clip_threshold;
  const double clip = size_of_update < 1.0 ? 1.0 : size_of_update;  // lets NaN through
  if (update.weight_decay != 0.0) {
    kernels.scale(static_cast<float>(1.0 - update.learning_rate * update.weight_decay), matrix.parameter, size);
  }
  const double alpha = std::max(update.eps2, size_of_parameter) * rate;
  kernels.add_scaled(static_cast<float>(-alpha / clip), gradient, matrix.parameter, size);
}

void check_step(const OptimizerStep& step, const std::vector<const LoraTensors*>& gradients,
                const OptimizerState& state) {
  if (gradients.empty()) throw InvalidArgument("an optimizer step needs the gradients of at least one member");
  if (step.step < 1) throw InvalidArgument("optimizer steps count from 1, got " + std::to_string(step.step));
  for (const OptimizerUpdate& update : step.updates) {
    update.validate();
    const bool both_adam = update.kind <= OptimizerKind::kAdam && state.kind() <= OptimizerKind::kAdam;
    if (update.kind != state.kind() && !both_adam) {
      throw InvalidArgument(std::string("the state is of ") + optimizer_name(state.kind()) + ", the step of " +
                            optimizer_name(update.kind));
    }
  }
}

}  // namespace

void Engine::step(const OptimizerStep& step, const std::vector<const LoraTensors*>& gradients, LoraTensors& parameters,
                  OptimizerState& state) {
  check_step(step, gradients, state);
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::vector<float>> sums(static_cast<std::size_t>(pool_.size())), buffers(sums.size());
  const auto sum_of = [&](LoraTensor tensor, std::int64_t first, std::int64_t count, int worker) {
    return sum_ranks(kernels_, gradients, tensor, first, count, sums[static_cast<std::size_t>(worker)]);
  };
  if (state.kind() == OptimizerKind::kAdafactor) {
    pool_.run(std::int64_t{kLoraTensors} * parameters.layer().experts, [&](std::int64_t task, int worker) {
      const LoraTensor tensor = static_cast<LoraTensor>(task % kLoraTensors);
      const LoraShape shape = lora_shape(parameters.layer(), parameters.lora(), tensor);
      const std::int64_t expert = task / kLoraTensors, size = shape.rows * shape.columns;
      if (size == 0) return;
      factored_step(kernels_, step.updates[static_cast<std::size_t>(tensor)], step,
                    {shape.rows, shape.columns, sum_of(tensor, expert * size, size, worker),
                     parameters.tensor(tensor).data() + expert * size,
                     reinterpret_cast<float*>(state.data(0, tensor)) + expert * shape.rows,
                     reinterpret_cast<float*>(state.data(1, tensor)) + expert * shape.columns},
                    buffers[static_cast<std::size_t>(worker)]);
    });
    return;
  }
  const bool first_gradient = state.fresh() || step.step == 1;
  state.set_used();
  const std::vector<SpanOf> spans = spans_of(parameters);
  const int type = static_cast<int>(state.moments()), width = moment_bytes(state.moments());
  pool_.run(static_cast<std::int64_t>(spans.size()), [&](std::int64_t task, int worker) {
    const SpanOf span = spans[static_cast<std::size_t>(task)];
    const OptimizerUpdate& update = step.updates[static_cast<std::size_t>(span.tensor)];
    const float* gradient = sum_of(span.tensor, span.first, span.count, worker);
    float* parameter = parameters.tensor(span.tensor).data() + span.first;
    const std::uint32_t first = static_cast<std::uint32_t>(span.first);
    const auto moment = [&](int slot) { return state.data(slot, span.tensor) + span.first * width; };
    if (state.kind() == OptimizerKind::kSgd) {
      kernels_.sgd[type](sgd_step(update, step, span.tensor, first_gradient), gradient, parameter, moment(0), first,
                         span.count);
    } else {
      kernels_.adam[type](adam_step(update, step, span.tensor), gradient, parameter, moment(0), moment(1), first,
                          span.count);
    }
  });
}

double Engine::gradient_square_sum(double scale, const std::vector<const LoraTensors*>& gradients) {
  if (gradients.empty()) throw InvalidArgument("a gradient norm needs the gradients of at least one member");
  std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<SpanOf> spans = spans_of(*gradients.front());
  std::vector<double> partial(spans.size(), 0.0);
  std::vector<std::vector<float>> buffers(static_cast<std::size_t>(pool_.size()));
  pool_.run(static_cast<std::int64_t>(spans.size()), [&](std::int64_t task, int worker) {
    const SpanOf span = spans[static_cast<std::size_t>(task)];
    const float* gradient =
        sum_ranks(kernels_, gradients, span.tensor, span.first, span.count, buffers[static_cast<std::size_t>(worker)]);
    partial[static_cast<std::size_t>(task)] = kernels_.sum_squares(gradient, span.count);
  });
  double total = 0.0;
  for (double value : partial) total += value;  // span order, so the same for any number of workers
  return total * scale * scale;
}

}  // namespace kt_expert
