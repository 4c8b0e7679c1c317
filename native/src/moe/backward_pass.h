// One backward in progress: its scratch and its phases.
#pragma once

#include "moe/pass.h"

namespace kt_expert {

class Engine::BackwardPass {
 public:
  BackwardPass(Engine& engine, const BackwardArgs& args);
  void run();

  static std::int64_t scratch_floats(const LayerSpec& layer, const LoraSpec& lora, std::int64_t tokens,
                                     std::int64_t routes, int workers);

 private:
  void restore();
  void recompute_h();
  void project_dy();
  void d_h();
  void route_gradients();
  void project_gate_up();
  void d_x();
  void accumulate_lora_gradients();
  void accumulate_gate_up(int expert, const GemmScratch& scratch);
  void accumulate_down(int expert, const GemmScratch& scratch);
  // gradient += scale * left^T right over one expert's rows; left [rows, m], right [rows, n], gathered where given.
  void outer(int expert, LoraTensor tensor, float scale, LeftOperand left, RightOperand right,
             const GemmScratch& scratch);
  void write_d_weights();

  const KernelTable& kernels_;
  Engine& engine_;
  ThreadPool& pool_;
  const BackwardArgs& args_;
  const LayerWeights& weights_;
  const LayerSpec& layer_;
  const Ticket& ticket_;
  const Routing& routing_;
  LoraSpec lora_;
  const float* x_ = nullptr;       // [tokens, H]
  const float* dy_ = nullptr;      // [tokens, H]
  float* d_gate_ = nullptr;        // [routes, I]
  float* d_up_ = nullptr;          // [routes, I]
  float* h_ = nullptr;             // [routes, I]
  float* d_h_ = nullptr;           // [routes, I], before the routing weight
  float* d_x_rows_ = nullptr;      // [routes, H]
  float* dy_b_down_ = nullptr;     // [routes, r] dy B_down
  float* d_gate_b_ = nullptr;      // [routes, r] d_gate B_gate
  float* d_up_b_ = nullptr;        // [routes, r] d_up B_up
  float* weighted_h_a_ = nullptr;  // [routes, r] w * h A_down^T
  float* row_d_weight_ = nullptr;  // [routes]
  float* worker_rows_ = nullptr;   // [workers, H]
};

}  // namespace kt_expert
