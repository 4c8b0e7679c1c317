// The fused optimizer step: ranks are summed, averaged, clipped and applied in one sweep over memory.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "gemm/kernels.h"
#include "kt_expert/engine.h"
#include "kt_expert/error.h"
#include "moe/arena.h"

namespace kt_expert {
namespace {

constexpr std::int64_t kSpanFloats = 16 * 1024;  // 64 KiB a stream: a handful of streams fit in L2

// What an estimate of one matrix takes beyond its state.
struct FactoredScratch {
  float* rows;  // sums of squares, then what estimates them
  float* row_roots;
  float* column_roots;  // sums of squares before

  FactoredScratch(float* first, const TensorShape& shape)
      : rows(first), row_roots(first + shape.rows), column_roots(first + 2 * shape.rows) {}
  static std::int64_t floats(const TensorShape& shape) { return 2 * shape.rows + shape.columns; }
};

struct SpanOf {
  AdapterTensor tensor;
  std::int64_t first;
  std::int64_t count;
};

// The tensors of a layer, cut into spans.
class Spans {
 public:
  Spans(const LayerSpec& layer, const AdapterSpec& lora) {
    for (int t = 0; t < kAdapterTensors; ++t) {
      const TensorShape shape = tensor_shape(layer, lora, static_cast<AdapterTensor>(t));
      sizes_[t] = shape.rows * shape.columns * layer.experts;
      ends_[t] = (t == 0 ? 0 : ends_[t - 1]) + (sizes_[t] + kSpanFloats - 1) / kSpanFloats;
    }
  }
  std::int64_t count() const { return ends_[kAdapterTensors - 1]; }
  SpanOf operator[](std::int64_t index) const {
    int t = 0;
    while (index >= ends_[t]) ++t;
    const std::int64_t first = (index - (t == 0 ? 0 : ends_[t - 1])) * kSpanFloats;
    return {static_cast<AdapterTensor>(t), first, std::min(kSpanFloats, sizes_[t] - first)};
  }

 private:
  std::array<std::int64_t, kAdapterTensors> sizes_, ends_;
};

// Floats one worker needs: a span summed over ranks, or for adafactor one expert's matrix summed over ranks and what
// its estimate takes.
std::int64_t worker_floats(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind, std::int64_t ranks) {
  std::int64_t most = ranks > 1 ? kSpanFloats : 0;
  if (kind != OptimizerKind::kAdafactor) return most;
  for (int t = 0; t < kAdapterTensors; ++t) {
    const TensorShape shape = tensor_shape(layer, lora, static_cast<AdapterTensor>(t));
    const std::int64_t summed = ranks > 1 ? shape.rows * shape.columns : 0;
    most = std::max(most, summed + FactoredScratch::floats(shape));
  }
  return most;
}

struct StepScratch {
  float* floats;  // [threads, worker_floats]
  std::int64_t worker_floats;
  double* parts;  // [spans], of norms

  StepScratch(Carver& carver, std::int64_t each, int threads, std::int64_t spans)
      : floats(carver.take<float>(each * threads)), worker_floats(each), parts(carver.take<double>(spans)) {}
  float* of(int worker) const { return floats + worker * worker_floats; }
};

// Gradients of one span, summed over ranks in their order: the first rank's own memory where there is only one.
const float* sum_ranks(const KernelTable& kernels, const std::vector<const AdapterTensors*>& gradients,
                       const SpanOf& span, float* buffer) {
  const auto of_rank = [&](std::size_t rank) { return gradients[rank]->tensor(span.tensor).data() + span.first; };
  if (gradients.size() == 1) return of_rank(0);
  std::copy_n(of_rank(0), span.count, buffer);
  for (std::size_t rank = 1; rank < gradients.size(); ++rank) {
    kernels.add_scaled(1.0f, of_rank(rank), buffer, span.count);
  }
  return buffer;
}

// One span's part in a norm of scale * gradient, and how two parts make one. NaN stays NaN.
struct NormPart {
  NormKind kind;
  double power;
  double scale;  // not negative

  double of(const KernelTable& kernels, const float* values, std::int64_t count) const {
    if (kind == NormKind::kPowers && power == 2.0) return kernels.sum_squares(values, count) * scale * scale;
    double joined = one(values[0]);
    for (std::int64_t i = 1; i < count; ++i) joined = join(joined, one(values[i]));
    return joined;
  }
  double join(double a, double b) const {
    if (kind == NormKind::kPowers || kind == NormKind::kNonzeros) return a + b;
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
    return kind == NormKind::kLargest ? std::max(a, b) : std::min(a, b);
  }

 private:
  double one(float value) const {
    const double size = std::abs(static_cast<double>(value)) * scale;
    if (kind == NormKind::kPowers) return power == 1.0 ? size : std::pow(size, power);
    if (kind == NormKind::kNonzeros) return size != 0.0 ? 1.0 : 0.0;
    return size;
  }
};

// Tells tensors and steps apart in the rounding of bf16 moments.
std::uint32_t rounding_seed(std::int64_t step, AdapterTensor tensor) {
  return static_cast<std::uint32_t>(step) * 0x9E3779B1u + static_cast<std::uint32_t>(tensor) * 0x27D4EB2Fu;
}

// `count` is that of the tensor's updates, this one included.
AdamStep adam_step(const OptimizerUpdate& update, double grad_scale, AdapterTensor tensor, std::int64_t count) {
  return {update.learning_rate,
          update.beta1,
          update.beta2,
          update.eps,
          update.weight_decay,
          grad_scale,
          1.0 - std::pow(update.beta1, static_cast<double>(count)),
          1.0 - std::pow(update.beta2, static_cast<double>(count)),
          update.kind == OptimizerKind::kAdamW,
          rounding_seed(count, tensor)};
}

SgdStep sgd_step(const OptimizerUpdate& update, double grad_scale, AdapterTensor tensor, std::int64_t count) {
  return {update.learning_rate, update.momentum, update.dampening, update.weight_decay,
          grad_scale,           update.nesterov, count == 1,       rounding_seed(count, tensor)};
}

// One expert's matrix, as torch.optim.Adafactor treats a parameter.
struct FactoredMatrix {
  TensorShape shape;
  const float* gradient;  // summed over ranks
  float* parameter;
  float* row_var;
  float* col_var;
};

// Takes a gradient's squares into the variances and makes an estimate of them.
FactoredEstimate estimate_squares(const KernelTable& kernels, const OptimizerUpdate& update, double count, double scale,
                                  const FactoredMatrix& matrix, const FactoredScratch& scratch) {
  const std::int64_t rows = matrix.shape.rows, columns = matrix.shape.columns;
  const double fresh = std::pow(count, update.beta2_decay);
  kernels.line_squares(matrix.gradient, rows, columns, scratch.rows, scratch.column_roots);
  const auto follow = [&](float* variances, const float* squares, std::int64_t size, std::int64_t summed) {
    kernels.scale(static_cast<float>(1.0 - fresh), variances, size);
    kernels.add_scaled(static_cast<float>(fresh * scale * scale / static_cast<double>(summed)), squares, variances,
                       size);
  };
  follow(matrix.row_var, scratch.rows, rows, columns);
  follow(matrix.col_var, scratch.column_roots, columns, rows);
  double row_sum = 0.0;
  for (std::int64_t m = 0; m < rows; ++m) row_sum += matrix.row_var[m];
  const double row_mean = std::max(row_sum / static_cast<double>(rows), update.eps1);
  for (std::int64_t m = 0; m < rows; ++m) {
    scratch.rows[m] = static_cast<float>(matrix.row_var[m] / row_mean);
    scratch.row_roots[m] = 1.0f / std::sqrt(scratch.rows[m]);
  }
  for (std::int64_t n = 0; n < columns; ++n) scratch.column_roots[n] = 1.0f / std::sqrt(matrix.col_var[n]);
  return {scratch.rows,
          matrix.col_var,
          scratch.row_roots,
          scratch.column_roots,
          static_cast<float>(update.eps1 * update.eps1),
          static_cast<float>(scale)};
}

void factored_step(const KernelTable& kernels, const OptimizerUpdate& update, double count, double scale,
                   const FactoredMatrix& matrix, const FactoredScratch& scratch) {
  const std::int64_t rows = matrix.shape.rows, columns = matrix.shape.columns, size = rows * columns;
  const double elements = static_cast<double>(size);
  const FactoredEstimate estimate = estimate_squares(kernels, update, count, scale, matrix, scratch);
  const double update_squares = kernels.factored_squares(estimate, matrix.gradient, rows, columns);
  const double rate = std::min(update.learning_rate, 1.0 / std::sqrt(count));
  const double size_of_parameter = std::sqrt(kernels.sum_squares(matrix.parameter, size) / elements);
  const double size_of_update = std::sqrt(update_squares / elements) / update.clip_threshold;
  const double clip = size_of_update < 1.0 ? 1.0 : size_of_update;  // lets NaN through
  if (update.weight_decay != 0.0) {
    kernels.scale(static_cast<float>(1.0 - update.learning_rate * update.weight_decay), matrix.parameter, size);
  }
  const double alpha = std::max(update.eps2, size_of_parameter) * rate;
  kernels.factored_apply(estimate, static_cast<float>(-alpha / clip), matrix.gradient, matrix.parameter, rows, columns);
}

void require_shape_of(const AdapterTensors& parameters, const LayerSpec& layer, const AdapterSpec& lora,
                      const char* what) {
  for (int t = 0; t < kAdapterTensors; ++t) {
    const AdapterTensor tensor = static_cast<AdapterTensor>(t);
    const TensorShape own = tensor_shape(parameters.layer(), parameters.spec(), tensor);
    const TensorShape other = tensor_shape(layer, lora, tensor);
    if (parameters.layer().experts != layer.experts || own.rows != other.rows || own.columns != other.columns) {
      throw InvalidArgument(std::string(what) + " have " + adapter_tensor_name(tensor) + " of " +
                            std::to_string(layer.experts) + " x " + std::to_string(other.rows) + " x " +
                            std::to_string(other.columns) + ", the parameters " +
                            std::to_string(parameters.layer().experts) + " x " + std::to_string(own.rows) + " x " +
                            std::to_string(own.columns));
    }
  }
}

void check_gradients(const std::vector<const AdapterTensors*>& gradients) {
  if (gradients.empty()) throw InvalidArgument("a step or norm needs the gradients of at least one member, got none");
  for (const AdapterTensors* each : gradients) {
    if (each == nullptr) throw InvalidArgument("the gradients of a member are null, expected one set per member");
    require_shape_of(*gradients.front(), each->layer(), each->spec(), "gradients of another member");
  }
}

void check_update(const LayerUpdate& layer) {
  if (layer.parameters == nullptr || layer.state == nullptr) {
    throw InvalidArgument("a layer's update needs parameters and state, got null");
  }
  if (layer.weights != nullptr) require_trained(*layer.weights, *layer.parameters);
  check_gradients(layer.gradients);
  const AdapterTensors& first = *layer.gradients.front();
  require_shape_of(*layer.parameters, first.layer(), first.spec(), "the gradients");
  require_shape_of(*layer.parameters, layer.state->layer(), layer.state->spec(), "the moments");
  for (const std::optional<TensorStep>& step : layer.step.tensors) {
    if (!step) continue;
    const OptimizerUpdate& update = step->update;
    update.validate();
    const bool both_adam = update.kind <= OptimizerKind::kAdam && layer.state->kind() <= OptimizerKind::kAdam;
    if (update.kind != layer.state->kind() && !both_adam) {
      throw InvalidArgument(std::string("the state is of ") + optimizer_name(layer.state->kind()) + ", the step of " +
                            optimizer_name(update.kind));
    }
  }
}

// Applies one layer's update with scratch that is there already, so that nothing can fail.
class LayerUpdater {
 public:
  LayerUpdater(const KernelTable& kernels, ThreadPool& pool, const LayerUpdate& layer, const StepScratch& scratch)
      : kernels_(kernels), pool_(pool), layer_(layer), scratch_(scratch) {
    for (int t = 0; t < kAdapterTensors; ++t) {
      const AdapterTensor tensor = static_cast<AdapterTensor>(t);
      if (!is_stepped(tensor)) continue;
      const OptimizerUpdate& update = step_of(tensor).update;
      if (update.kind != OptimizerKind::kSgd || update.momentum != 0.0) ++layer.state->steps(tensor);
    }
  }

  void run() {
    if (layer_.state->kind() == OptimizerKind::kAdafactor) {
      pool_.run(std::int64_t{kAdapterTensors} * layer_.parameters->layer().experts,
                [&](std::int64_t task, int worker) { step_matrix(task, worker); });
    } else {
      const Spans spans(layer_.parameters->layer(), layer_.parameters->spec());
      pool_.run(spans.count(), [&](std::int64_t task, int worker) { step_span(spans[task], worker); });
    }
  }

 private:
  bool is_stepped(AdapterTensor tensor) const {
    return layer_.step.of(tensor).has_value() && !layer_.parameters->tensor(tensor).empty();
  }
  const TensorStep& step_of(AdapterTensor tensor) const { return *layer_.step.of(tensor); }
  std::int64_t count_of(AdapterTensor tensor) const { return static_cast<std::int64_t>(layer_.state->steps(tensor)); }

  void step_matrix(std::int64_t task, int worker) {
    const AdapterTensor tensor = static_cast<AdapterTensor>(task % kAdapterTensors);
    const TensorShape shape = tensor_shape(layer_.parameters->layer(), layer_.parameters->spec(), tensor);
    const std::int64_t expert = task / kAdapterTensors, size = shape.rows * shape.columns;
    if (!is_stepped(tensor)) return;
    float* floats = scratch_.of(worker);
    const float* gradient = sum_ranks(kernels_, layer_.gradients, {tensor, expert * size, size}, floats);
    factored_step(kernels_, step_of(tensor).update, static_cast<double>(count_of(tensor)), step_of(tensor).grad_scale,
                  {shape, gradient, layer_.parameters->tensor(tensor).data() + expert * size,
                   reinterpret_cast<float*>(layer_.state->data(0, tensor)) + expert * shape.rows,
                   reinterpret_cast<float*>(layer_.state->data(1, tensor)) + expert * shape.columns},
                  FactoredScratch(layer_.gradients.size() > 1 ? floats + size : floats, shape));
  }

  void step_span(const SpanOf& span, int worker) {
    if (!is_stepped(span.tensor)) return;
    OptimizerState& state = *layer_.state;
    const TensorStep& step = step_of(span.tensor);
    const int type = static_cast<int>(state.moments()), width = moment_bytes(state.moments());
    const float* gradient = sum_ranks(kernels_, layer_.gradients, span, scratch_.of(worker));
    float* parameter = layer_.parameters->tensor(span.tensor).data() + span.first;
    const std::uint32_t first = static_cast<std::uint32_t>(span.first);
    const auto moment = [&](int slot) { return state.data(slot, span.tensor) + span.first * width; };
    if (state.kind() == OptimizerKind::kSgd) {
      void* buffer = step.update.momentum == 0.0 ? nullptr : moment(0);
      kernels_.sgd[type](sgd_step(step.update, step.grad_scale, span.tensor, count_of(span.tensor)), gradient,
                         parameter, buffer, first, span.count);
    } else {
      kernels_.adam[type](adam_step(step.update, step.grad_scale, span.tensor, count_of(span.tensor)), gradient,
                          parameter, moment(0), moment(1), first, span.count);
    }
  }

  const KernelTable& kernels_;
  ThreadPool& pool_;
  const LayerUpdate& layer_;
  const StepScratch& scratch_;
};

}  // namespace

std::int64_t Engine::step_bytes(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind, int ranks,
                                int threads) {
  Carver carver(nullptr);
  StepScratch(carver, worker_floats(layer, lora, kind, ranks), threads, Spans(layer, lora).count());
  return carver.used();
}

void Engine::step(const std::vector<LayerUpdate>& layers) {
  std::int64_t each = 0;
  for (const LayerUpdate& layer : layers) {
    check_update(layer);
    each = std::max(each, worker_floats(layer.parameters->layer(), layer.parameters->spec(), layer.state->kind(),
                                        static_cast<std::int64_t>(layer.gradients.size())));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  Carver sizes(nullptr);
  StepScratch(sizes, each, threads(), 0);
  const Arena::Lease lease(*arena_, sizes.used());
  Carver carver(lease.data());
  const StepScratch scratch(carver, each, threads(), 0);
  for (const LayerUpdate& layer : layers) {
    LayerUpdater(kernels_, pool_, layer, scratch).run();
    if (layer.weights != nullptr) encode(*layer.parameters, 0, layer.weights->spec().experts, *layer.weights);
  }
}

std::array<double, kAdapterTensors> Engine::gradient_norms(NormKind kind, double power, double scale,
                                                           const std::vector<const AdapterTensors*>& gradients) {
  check_gradients(gradients);
  const LayerSpec& layer = gradients.front()->layer();
  const AdapterSpec& lora = gradients.front()->spec();
  const Spans spans(layer, lora);
  const std::int64_t each =
      worker_floats(layer, lora, OptimizerKind::kAdamW, static_cast<std::int64_t>(gradients.size()));
  std::lock_guard<std::mutex> lock(mutex_);
  Carver sizes(nullptr);
  StepScratch(sizes, each, threads(), spans.count());
  const Arena::Lease lease(*arena_, sizes.used());
  Carver carver(lease.data());
  const StepScratch scratch(carver, each, threads(), spans.count());
  const NormPart part{kind, power, std::abs(scale)};
  pool_.run(spans.count(), [&](std::int64_t task, int worker) {
    const SpanOf span = spans[task];
    scratch.parts[task] = part.of(kernels_, sum_ranks(kernels_, gradients, span, scratch.of(worker)), span.count);
  });
  std::array<double, kAdapterTensors> norms{};
  std::array<bool, kAdapterTensors> begun{};
  for (std::int64_t i = 0; i < spans.count(); ++i) {  // in order: the same for any number of workers
    const std::size_t tensor = static_cast<std::size_t>(spans[i].tensor);
    norms[tensor] = begun[tensor] ? part.join(norms[tensor], scratch.parts[i]) : scratch.parts[i];
    begun[tensor] = true;
  }
  return norms;
}

}  // namespace kt_expert
