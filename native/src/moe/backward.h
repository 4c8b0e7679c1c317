// One backward in progress.
#pragma once

#include "moe/hidden.h"

namespace kt_expert {

class Engine::BackwardPass : private Engine::Pass {
 public:
  static void run(Engine& engine, const BackwardArgs& args);
  static std::int64_t scratch_bytes(const KernelTable& kernels, const LayerSpec& layer, const AdapterSpec& lora,
                                    std::int64_t tokens, std::int64_t routes, int nodes, int workers,
                                    bool trains_weights);

 private:
  struct Buffers {
    HiddenStore recomputed;  // only where the ticket kept x alone
    TokenOperands dy;
    OperandRows d_gate, d_up;  // [routes, I]
    float* x_f32 = nullptr;    // [tokens, H], for dA of gate and up
    float* dy_f32 = nullptr;   // [tokens, H], for dB of down; null, as the next two, where operands are fp32 themselves
    float* d_gate_f32 = nullptr;  // [routes, I]
    float* d_up_f32 = nullptr;
    float* h_f32 = nullptr;         // [routes, I], for the gradient of A_down
    LoraRows dy_b_down;             // scale * dy B_down, later times the routing weight
    LoraRows d_gate_b, d_up_b;      // scale * d_gate B_gate; where tied, both sums in d_gate_b
    float* weighted_h_a = nullptr;  // [routes, rank_stride] w * scale * h A_down^T
    float* whole_x_f32 = nullptr;   // [tokens, H] and w * h [routes, I], without dropout, for dW
    float* weighted_h = nullptr;
    float* d_weight_parts = nullptr;
    float* d_weight_rows = nullptr;  // [routes]
    TokenSums dx;
  };
  static Buffers take(Carver& carver, const KernelTable& kernels, const LayerSpec& layer, const AdapterSpec& lora,
                      std::int64_t tokens, std::int64_t routes, int nodes, SavePolicy policy, FloatType output,
                      bool trains_weights);

  BackwardPass(Engine& engine, const BackwardArgs& args, const HiddenStore& saved, const Buffers& buffers);
  void run_phases();

  void load();
  void project_dy();
  void hidden_block(const BlockTask& at);
  void finish_hidden_row(int expert, std::int64_t row, int first_column, int columns, std::int64_t padded, float* d_h,
                         float* h);
  void finish_route_gradients();
  float dot_with_dy(const float* bias, std::int64_t token) const;
  void project_hidden();
  void input_gradients();
  void input_block(const BlockTask& at, float* block) const;
  bool trains_weights() const { return args_.weight_gradients != nullptr; }
  void clear_gradients();
  void lora_gradients();
  void lora_gradient(int expert, AdapterTensor tensor);
  void weight_gradients();
  void weight_gradient(int expert, AdapterTensor tensor, std::int64_t first_row);
  void write_d_weights() const;
  OuterRows d_hidden_rows(const OperandRows& operands, const float* f32, std::int64_t first) const;

  const BackwardArgs& args_;
  HiddenStore saved_;
  Buffers buffers_;
  std::int64_t parts_per_row_;
  OuterRows x_, dy_;   // [tokens, H]
  OuterRows whole_x_;  // without dropout
};

}  // namespace kt_expert
