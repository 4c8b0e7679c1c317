// The weights of one MoE layer, resident once, and the shape they have.
#pragma once

#include <cstdint>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/bf16.h"
#include "kt_expert/span.h"

namespace kt_expert {

enum class Activation { kSilu = 0, kGptOss = 1 };

// h = act(gate) * up, as the checkpoint defines it. alpha and limit are read by kGptOss only:
// gate' = min(gate, limit); up' = clamp(up, -limit, limit); h = (up' + 1) * gate' * sigmoid(alpha * gate').
struct ActivationSpec {
  Activation kind = Activation::kSilu;
  float alpha = 1.0f;
  float limit = 0.0f;
};

struct LayerSpec {
  int experts = 0;
  int hidden = 0;        // H, width of a token
  int intermediate = 0;  // I, width between the projections
  ActivationSpec activation;
  bool has_bias = false;

  // Throws InvalidArgument where a size is outside what the core indexes.
  void validate() const;
};

enum class Projection { kGate = 0, kUp = 1, kDown = 2 };

// How a gate-and-up tensor of a checkpoint interleaves its two halves.
enum class GateUpOrder { kConcatenated, kInterleaved };

// gate, up [E, I, H] and down [E, H, I], row-major bf16; biases, where the layer has them, fp32: [E, I], [E, I], [E,
// H]. Forward and backward read these same bytes.
class LayerWeights {
 public:
  explicit LayerWeights(const LayerSpec& spec);

  const LayerSpec& spec() const { return spec_; }
  // One expert's matrix, rows x columns. Throws InvalidArgument for an expert outside [0, E).
  Span<bf16_t> matrix(Projection projection, int expert);
  const bf16_t* matrix(Projection projection, int expert) const;
  Span<float> bias(Projection projection, int expert);
  const float* bias(Projection projection, int expert) const;
  std::int64_t bytes() const;

  // Fills gate and up of one expert from one [2I, H] matrix, or with `transposed` from [H, 2I].
  void set_gate_up(int expert, Span<const bf16_t> source, GateUpOrder order, bool transposed);
  // Fills gate-and-up biases of one expert from [2I].
  void set_gate_up_bias(int expert, Span<const float> source, GateUpOrder order);
  // Fills down of one expert from [H, I], or with `transposed` from [I, H].
  void set_down(int expert, Span<const bf16_t> source, bool transposed);

 private:
  void require_expert(int expert) const;
  std::int64_t matrix_size() const { return static_cast<std::int64_t>(spec_.hidden) * spec_.intermediate; }
  int bias_size(Projection projection) const {
    return projection == Projection::kDown ? spec_.hidden : spec_.intermediate;
  }

  LayerSpec spec_;
  AlignedBuffer<bf16_t> weights_[3];
  AlignedBuffer<float> biases_[3];
};

}  // namespace kt_expert
