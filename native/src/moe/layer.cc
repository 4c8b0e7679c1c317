#include "kt_expert/layer.h"

#include <string>

#include "kt_expert/error.h"

namespace kt_expert {
namespace {

constexpr int kMaxExperts = 1 << 16;  // ids travel as int32; far above any published model
constexpr int kMaxWidth = 1 << 20;

void require_size(const char* name, int value, int limit) {
  if (value < 1 || value > limit) {
    throw InvalidArgument(std::string(name) + " is " + std::to_string(value) + ", expected a value in [1, " +
                          std::to_string(limit) + "]");
  }
}

void require_count(const char* name, std::size_t got, std::int64_t expected) {
  if (static_cast<std::int64_t>(got) != expected) {
    throw InvalidArgument(std::string(name) + " holds " + std::to_string(got) + " elements, expected " +
                          std::to_string(expected));
  }
}

}  // namespace

void LayerSpec::validate() const {
  require_size("num_experts", experts, kMaxExperts);
  require_size("hidden_size", hidden, kMaxWidth);
  require_size("intermediate_size", intermediate, kMaxWidth);
  if (activation.kind == Activation::kGptOss && !(activation.limit > 0.0f)) {
    throw InvalidArgument("the clamped swiglu needs a limit above 0, got " + std::to_string(activation.limit));
  }
}

LayerWeights::LayerWeights(const LayerSpec& spec) : spec_(spec) {
  spec_.validate();
  const std::size_t experts = static_cast<std::size_t>(spec.experts);
  for (int p = 0; p < 3; ++p) {
    weights_[p] = AlignedBuffer<bf16_t>(experts * static_cast<std::size_t>(matrix_size()));
    if (spec.has_bias) {
      biases_[p] = AlignedBuffer<float>(experts * static_cast<std::size_t>(bias_size(static_cast<Projection>(p))));
    }
  }
}

void LayerWeights::require_expert(int expert) const {
  if (expert < 0 || expert >= spec_.experts) {
    throw InvalidArgument("expert " + std::to_string(expert) + " is outside [0, " + std::to_string(spec_.experts) +
                          ")");
  }
}

Span<bf16_t> LayerWeights::matrix(Projection projection, int expert) {
  require_expert(expert);
  return {weights_[static_cast<int>(projection)].data() + expert * matrix_size(),
          static_cast<std::size_t>(matrix_size())};
}

const bf16_t* LayerWeights::matrix(Projection projection, int expert) const {
  return weights_[static_cast<int>(projection)].data() + expert * matrix_size();
}

Span<float> LayerWeights::bias(Projection projection, int expert) {
  require_expert(expert);
  if (!spec_.has_bias) throw InvalidArgument("this layer has no biases; set has_bias in its spec");
  const int size = bias_size(projection);
  return {biases_[static_cast<int>(projection)].data() + static_cast<std::int64_t>(expert) * size,
          static_cast<std::size_t>(size)};
}

const float* LayerWeights::bias(Projection projection, int expert) const {
  if (!spec_.has_bias) return nullptr;
  return biases_[static_cast<int>(projection)].data() + static_cast<std::int64_t>(expert) * bias_size(projection);
}

std::int64_t LayerWeights::bytes() const {
  std::int64_t total = 0;
  for (int p = 0; p < 3; ++p) {
    total += static_cast<std::int64_t>(weights_[p].size() * sizeof(bf16_t) + biases_[p].size() * sizeof(float));
  }
  return total;
}

void LayerWeights::set_gate_up(int expert, Span<const bf16_t> source, GateUpOrder order, bool transposed) {
  require_count("gate_up", source.size(), 2 * matrix_size());
  const Span<bf16_t> halves[2] = {matrix(Projection::kGate, expert), matrix(Projection::kUp, expert)};
  const std::int64_t hidden = spec_.hidden, intermediate = spec_.intermediate;
  for (int half = 0; half < 2; ++half) {
    for (std::int64_t i = 0; i < intermediate; ++i) {
      const std::int64_t row = order == GateUpOrder::kInterleaved ? 2 * i + half : half * intermediate + i;
      for (std::int64_t j = 0; j < hidden; ++j) {
        const std::int64_t at = transposed ? j * 2 * intermediate + row : row * hidden + j;
        halves[half][static_cast<std::size_t>(i * hidden + j)] = source[static_cast<std::size_t>(at)];
      }
    }
  }
}

void LayerWeights::set_gate_up_bias(int expert, Span<const float> source, GateUpOrder order) {
  require_count("gate_up bias", source.size(), 2 * static_cast<std::int64_t>(spec_.intermediate));
  const Span<float> halves[2] = {bias(Projection::kGate, expert), bias(Projection::kUp, expert)};
  const std::size_t intermediate = static_cast<std::size_t>(spec_.intermediate);
  for (std::size_t half = 0; half < 2; ++half) {
    for (std::size_t i = 0; i < intermediate; ++i) {
      halves[half][i] = source[order == GateUpOrder::kInterleaved ? 2 * i + half : half * intermediate + i];
    }
  }
}

void LayerWeights::set_down(int expert, Span<const bf16_t> source, bool transposed) {
  require_count("down", source.size(), matrix_size());
  const Span<bf16_t> target = matrix(Projection::kDown, expert);
  const std::int64_t hidden = spec_.hidden, intermediate = spec_.intermediate;
  for (std::int64_t i = 0; i < hidden; ++i) {
    for (std::int64_t j = 0; j < intermediate; ++j) {
      const std::int64_t at = transposed ? j * hidden + i : i * intermediate + j;
      target[static_cast<std::size_t>(i * intermediate + j)] = source[static_cast<std::size_t>(at)];
    }
  }
}

}  // namespace kt_expert
