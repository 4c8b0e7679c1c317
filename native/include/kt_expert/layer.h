// The weights of one MoE layer, resident once, and the shape they have.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/bf16.h"
#include "kt_expert/packed_matrix.h"
#include "kt_expert/span.h"

namespace kt_expert {

enum class Activation { kSilu = 0, kGptOss = 1, kGeluTanh = 2, kRelu2 = 3, kClampedSilu = 4 };

// A layer whose activation has no gate has up and down projections only.
constexpr bool has_gate(Activation kind) { return kind != Activation::kRelu2; }
constexpr bool has_limit(Activation kind) { return kind == Activation::kGptOss || kind == Activation::kClampedSilu; }

// h as the checkpoint defines it:
//   silu          gate * sigmoid(gate) * up
//   gpt_oss       gate' * sigmoid(alpha * gate') * (up' + 1), gate' = min(gate, limit), up' = clamp(up, -limit, limit)
//   gelu_tanh     gelu(gate) * up, gelu in its tanh form
//   relu2         relu(up)^2
//   clamped_silu  gate' * sigmoid(gate') * up', clamped as in gpt_oss
struct ActivationSpec {
  Activation kind = Activation::kSilu;
  float alpha = 1.0f;  // of gpt_oss; 1 for the others
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
constexpr int kProjections = 3;

// How a gate-and-up tensor of a checkpoint interleaves its two halves.
enum class GateUpOrder { kConcatenated, kInterleaved };

// The weights of one layer: gate, up [E, I, H] and down [E, H, I] in one resident form that forward and backward both
// read; biases, where the layer has them, fp32: [E, I], [E, I], [E, H].
//
// The layer is cut along I into one slice a memory node, so that a node's workers read the node's own memory: a slice
// holds rows of gate and up and columns of down. A slice may be empty where I is small.
class LayerWeights {
 public:
  struct Slice {
    int first = 0;  // of I
    int count = 0;
    PackedTensor matrices[kProjections];  // gate is empty where the activation has none

    PackedMatrix matrix(Projection projection, int expert) const {
      return matrices[static_cast<int>(projection)].matrix(expert);
    }
  };

  // With `memory_nodes`, ids of as many of the machine's own, each slice's pages are asked for from its node.
  LayerWeights(const LayerSpec& spec, WeightFormat format, int nodes, const std::vector<int>& memory_nodes = {});
  // Weights of the same layer and on the same memory nodes in another format, zero.
  LayerWeights empty_like(WeightFormat format) const {
    return LayerWeights(spec_, format, static_cast<int>(slices_.size()), memory_nodes_);
  }

  const LayerSpec& spec() const { return spec_; }
  WeightFormat format() const { return format_; }
  const std::vector<Slice>& slices() const { return slices_; }
  Span<float> bias(Projection projection, int expert);
  const float* bias(Projection projection, int expert) const;
  std::int64_t bytes() const;
  // What kept slices from the nodes they were asked for on; empty where nothing did.
  const std::string& placement_obstacle() const { return placement_obstacle_; }
  // What `bytes` will be, before anything is allocated.
  static std::int64_t bytes_of(const LayerSpec& spec, WeightFormat format, int nodes);

  // Each converts to the resident form. Sources are row-major; sizes that differ from the spec's, an expert outside
  // [0, E) and values the format cannot hold throw InvalidArgument.
  void set_matrix(Projection projection, int expert, Span<const bf16_t> source);
  // Fills gate and up of one expert from one [2I, H] matrix, or with `transposed` from [H, 2I].
  void set_gate_up(int expert, Span<const bf16_t> source, GateUpOrder order, bool transposed);
  // Fills gate-and-up biases of one expert from [2I].
  void set_gate_up_bias(int expert, Span<const float> source, GateUpOrder order);
  // Fills down of one expert from [H, I], or with `transposed` from [I, H].
  void set_down(int expert, Span<const bf16_t> source, bool transposed);
  // Codes and scales as a checkpoint of the same format holds them (NativeSource says how).
  void set_native(Projection projection, int expert, Span<const std::uint8_t> codes, Span<const std::uint8_t> scales);
  // A part of one row, from a column on, of weights in bf16. Different values may be set at the same time.
  void set_values(Projection projection, int expert, int row, int first_column, Span<const bf16_t> values);

  // The values the kernels work with: [rows, columns] of the projection, or some of its rows.
  std::vector<float> dequantized(Projection projection, int expert) const;
  void dequantize_rows(Projection projection, int expert, int first_row, int rows, float* into) const;
  int rows_of(Projection projection) const {
    return projection == Projection::kDown ? spec_.hidden : spec_.intermediate;
  }
  int columns_of(Projection projection) const {
    return projection == Projection::kDown ? spec_.intermediate : spec_.hidden;
  }

 private:
  void require_expert(int expert) const;
  void require_projection(Projection projection) const;
  void encode(Projection projection, int expert, const DenseSource& whole);

  LayerSpec spec_;
  WeightFormat format_;
  std::vector<int> memory_nodes_;
  std::vector<Slice> slices_;
  std::string placement_obstacle_;
  AlignedBuffer<float> biases_[kProjections];
};

}  // namespace kt_expert
