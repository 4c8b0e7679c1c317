// One backward in progress, of one batch or several.
#pragma once

#include "moe/hidden.h"

namespace kt_expert {

class Engine::BackwardPass : private Engine::Pass {
 public:
  // All of one layer's weights, one type of tokens and one save policy.
  static void run(Engine& engine, Span<const BackwardArgs> args);
  static std::int64_t scratch_bytes(const KernelTable& kernels, const LayerSpec& layer,
                                    const std::vector<BatchSize>& batches, int nodes, int workers, bool trains_weights);

 private:
  // Of one batch.
  struct OwnBuffers {
    HiddenStore recomputed;   // only where the ticket kept x alone
    float* x_f32 = nullptr;   // [tokens, H], for dA of gate and up
    float* dy_f32 = nullptr;  // [tokens, H], for dB of down; null, as the next two, where operands are fp32 themselves
    float* d_gate_f32 = nullptr;    // [routes, I]
    float* d_up_f32 = nullptr;      //
    float* h_f32 = nullptr;         // [routes, I], for the gradient of A_down
    LoraRows dy_b_down;             // scale * dy B_down, later times the routing weight
    LoraRows d_gate_b, d_up_b;      // scale * d_gate B_gate; where tied, both sums in d_gate_b
    float* weighted_h_a = nullptr;  // [routes, rank_stride] w * scale * h A_down^T
    float* whole_x_f32 = nullptr;   // [tokens, H] and w * h [routes, I], without dropout, for dW
    float* weighted_h = nullptr;
    float* d_weight_parts = nullptr;
    float* d_weight_rows = nullptr;  // [routes]
    OuterRows x, dy;                 // [tokens, H]
    OuterRows whole_x;               // without dropout
    HiddenStore saved;
  };
  // Rows of all batches.
  struct Buffers {
    TokenOperands dy;
    OperandRows d_gate, d_up;  // [routes, I]
    TokenSums dx;
    std::vector<OwnBuffers> own;
  };
  static Buffers take(Carver& carver, const KernelTable& kernels, const LayerSpec& layer,
                      const std::vector<BatchSize>& batches, int nodes, SavePolicy policy, FloatType output,
                      bool trains_weights);
  static OwnBuffers take_own(Carver& carver, const KernelTable& kernels, const LayerSpec& layer, const BatchSize& batch,
                             SavePolicy policy, bool trains_weights);

  BackwardPass(Engine& engine, Span<const BackwardArgs> args, std::vector<Batch> batches, StageClock& clock,
               Buffers buffers);
  void run_phases();

  void load();
  void load_batch(std::size_t batch);
  void project_dy();
  void hidden_block(const BlockTask& at);
  void finish_hidden_row(const BatchRows& rows, int m, int first_column, int columns, std::int64_t padded, float* d_h,
                         float* h);
  void finish_route_gradients();
  float dot_with_dy(TokensIn dy, const float* bias, std::int64_t token) const;
  void project_hidden();
  void project_hidden_rows(const BatchRows& rows, int worker);
  void input_gradients();
  void input_block(const BlockTask& at, float* block) const;
  bool trains_weights(std::size_t batch) const { return args_[batch].weight_gradients != nullptr; }
  void clear_gradients(std::size_t batch);
  struct BatchExpert {
    std::size_t batch;
    int expert;
  };
  std::vector<BatchExpert> with_lora_gradients() const;
  void lora_gradients(const std::vector<BatchExpert>& matrices);
  void lora_gradient(std::size_t batch, int expert, AdapterTensor tensor);
  void weight_gradients(std::size_t batch);
  void weight_gradient(std::size_t batch, int expert, AdapterTensor tensor, std::int64_t first_row);
  void write_d_weights(std::size_t batch) const;
  // Rows from `first` of a batch's routing on, which lie at `shared` among those of all.
  OuterRows d_hidden_rows(const OperandRows& operands, const float* f32, std::int64_t first, std::int64_t shared) const;

  Span<const BackwardArgs> args_;
  Buffers buffers_;
  std::int64_t parts_per_row_;
};

}  // namespace kt_expert
