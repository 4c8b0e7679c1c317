// Weights that are trained: fp32 masters, and the bf16 form of them that passes use.
#include <algorithm>

#include "gemm/kernels.h"
#include "kt_expert/engine.h"
#include "kt_expert/error.h"

namespace kt_expert {
namespace {

constexpr int kRowsOfTask = 64;
constexpr int kPieceColumns = 1024;  // rounded at a time, on the stack

constexpr AdapterTensor kWeightOf[kProjections] = {AdapterTensor::kWGate, AdapterTensor::kWUp, AdapterTensor::kWDown};
constexpr AdapterTensor kBiasOf[kProjections] = {AdapterTensor::kBiasGate, AdapterTensor::kBiasUp,
                                                 AdapterTensor::kBiasDown};

void require_weights_of(const LayerWeights& weights, const AdapterTensors& tensors) {
  const LayerSpec &own = weights.spec(), &other = tensors.layer();
  if (!tensors.spec().full || own.experts != other.experts || own.hidden != other.hidden ||
      own.intermediate != other.intermediate || own.has_bias != other.has_bias ||
      own.activation.kind != other.activation.kind) {
    throw InvalidArgument("these tensors are not the weights of a layer of this shape");
  }
}

struct MatrixRows {
  Projection projection;
  int expert;
  int first;
  int count;
};

// Every matrix of some experts, some rows at a time.
class RowTasks {
 public:
  RowTasks(const LayerWeights& weights, int first_expert, int experts)
      : weights_(weights), first_expert_(first_expert), experts_(experts) {
    for (int p = 0; p < kProjections; ++p) {
      const Projection projection = static_cast<Projection>(p);
      const bool there = projection != Projection::kGate || has_gate(weights.spec().activation.kind);
      ends_[p] =
          (p == 0 ? 0 : ends_[p - 1]) + (there ? (weights.rows_of(projection) + kRowsOfTask - 1) / kRowsOfTask : 0);
    }
  }
  std::int64_t count() const { return std::int64_t{ends_[kProjections - 1]} * experts_; }
  MatrixRows operator[](std::int64_t index) const {
    const int in_expert = static_cast<int>(index % ends_[kProjections - 1]);
    const int p = static_cast<int>(std::upper_bound(ends_, ends_ + kProjections, in_expert) - ends_);
    const Projection projection = static_cast<Projection>(p);
    const int first = (in_expert - (p == 0 ? 0 : ends_[p - 1])) * kRowsOfTask;
    return {projection, first_expert_ + static_cast<int>(index / ends_[kProjections - 1]), first,
            std::min(kRowsOfTask, weights_.rows_of(projection) - first)};
  }

 private:
  const LayerWeights& weights_;
  int first_expert_, experts_;
  int ends_[kProjections];
};

}  // namespace

void Engine::decode_weights(const LayerWeights& weights, AdapterTensors& into) {
  require_weights_of(weights, into);
  const int experts = weights.spec().experts;
  const RowTasks tasks(weights, 0, experts);
  const std::lock_guard<std::mutex> lock(mutex_);
  pool_.run(tasks.count(), [&](std::int64_t task, int) {
    const MatrixRows rows = tasks[task];
    float* target = into.expert(kWeightOf[static_cast<int>(rows.projection)], rows.expert);
    weights.dequantize_rows(rows.projection, rows.expert, rows.first, rows.count,
                            target + std::int64_t{rows.first} * weights.columns_of(rows.projection));
  });
  for (int p = 0; p < kProjections; ++p) {
    const AlignedBuffer<float>& target = into.tensor(kBiasOf[p]);
    for (int e = 0; !target.empty() && e < experts; ++e) {
      const Projection projection = static_cast<Projection>(p);
      std::copy_n(weights.bias(projection, e), weights.rows_of(projection), into.expert(kBiasOf[p], e));
    }
  }
}

void require_trained(const LayerWeights& weights, const AdapterTensors& tensors) {
  require_weights_of(weights, tensors);
  if (weights.format() != WeightFormat::kBf16) throw InvalidArgument("weights that are trained are kept in bf16");
}

void Engine::encode_weights(const AdapterTensors& from, int first_expert, int experts, LayerWeights& into) {
  require_trained(into, from);
  if (first_expert < 0 || experts < 0 || first_expert + experts > into.spec().experts) {
    throw InvalidArgument("experts " + std::to_string(first_expert) + " to " + std::to_string(first_expert + experts) +
                          " are outside the layer");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  encode(from, first_expert, experts, into);
}

void Engine::encode(const AdapterTensors& from, int first_expert, int experts, LayerWeights& into) {
  const RowTasks tasks(into, first_expert, experts);
  pool_.run(tasks.count(), [&](std::int64_t task, int) {
    const MatrixRows rows = tasks[task];
    const int columns = into.columns_of(rows.projection);
    const float* source = from.expert(kWeightOf[static_cast<int>(rows.projection)], rows.expert);
    bf16_t piece[kPieceColumns];
    for (int row = rows.first; row < rows.first + rows.count; ++row) {
      for (int column = 0; column < columns; column += kPieceColumns) {
        const int count = std::min(kPieceColumns, columns - column);
        kernels_.f32_to_bf16(source + std::int64_t{row} * columns + column, piece, count);
        into.set_values(rows.projection, rows.expert, row, column, {piece, static_cast<std::size_t>(count)});
      }
    }
  });
  for (int p = 0; p < kProjections; ++p) {
    for (int e = first_expert; !from.tensor(kBiasOf[p]).empty() && e < first_expert + experts; ++e) {
      const Span<float> target = into.bias(static_cast<Projection>(p), e);
      std::copy_n(from.expert(kBiasOf[p], e), target.size(), target.data());
    }
  }
}

}  // namespace kt_expert
