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

void Engine::adamw(const AdamWParams& params, const std::vector<const LoraTensors*>& gradients, LoraTensors& parameters,
                   LoraTensors& exp_avg, LoraTensors& exp_avg_sq) {
  if (gradients.empty()) throw InvalidArgument("an optimizer step needs the gradients of at least one member");
  if (params.step < 1) throw InvalidArgument("optimizer steps count from 1, got " + std::to_string(params.step));
  std::lock_guard<std::mutex> lock(mutex_);
  const double count = static_cast<double>(params.step);
  const AdamWStep step{params.learning_rate,
                       params.beta1,
                       params.beta2,
                       params.eps,
                       params.weight_decay,
                       params.grad_scale,
                       1.0 - std::pow(params.beta1, count),
                       1.0 - std::pow(params.beta2, count)};
  const std::vector<SpanOf> spans = spans_of(parameters);
  std::vector<std::vector<float>> buffers(static_cast<std::size_t>(pool_.size()));
  pool_.run(static_cast<std::int64_t>(spans.size()), [&](std::int64_t task, int worker) {
    const SpanOf span = spans[static_cast<std::size_t>(task)];
    const float* gradient =
        sum_ranks(kernels_, gradients, span.tensor, span.first, span.count, buffers[static_cast<std::size_t>(worker)]);
    kernels_.adamw(step, gradient, parameters.tensor(span.tensor).data() + span.first,
                   exp_avg.tensor(span.tensor).data() + span.first, exp_avg_sq.tensor(span.tensor).data() + span.first,
                   span.count);
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
