// One forward in progress: its scratch and its phases.
#pragma once

#include "moe/pass.h"

namespace kt_expert {

class Engine::ForwardPass {
 public:
  ForwardPass(Engine& engine, const ForwardArgs& args);
  std::unique_ptr<Ticket> run();

  static std::int64_t scratch_floats(const LayerSpec& layer, const LoraSpec& lora, std::int64_t tokens,
                                     std::int64_t routes, int workers);

 private:
  void project_lora_inputs(const LoraSpec& lora);
  void gate_up_and_activate(const LoraSpec& lora);
  void project_h(const LoraSpec& lora);
  void down(const LoraSpec& lora);
  void fill_bias(Projection projection, int expert, Columns columns, int width, float* out) const;

  const KernelTable& kernels_;
  Engine& engine_;
  ThreadPool& pool_;
  const ForwardArgs& args_;
  const LayerWeights& weights_;
  const LayerSpec& layer_;
  const Routing& routing_;
  const float* x_ = nullptr;   // [tokens, H]
  float* gate_ = nullptr;      // [routes, I]
  float* up_ = nullptr;        // [routes, I]
  float* h_ = nullptr;         // [routes, I]
  float* down_ = nullptr;      // [routes, H]
  float* x_a_gate_ = nullptr;  // [routes, r]
  float* x_a_up_ = nullptr;    // [routes, r], x_a_gate_ where tied
  float* h_a_down_ = nullptr;  // [routes, r]
};

}  // namespace kt_expert
