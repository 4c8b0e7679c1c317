// The compute engine: forward, backward and optimizer step of MoE layers on one team of workers.
//
// One operation runs at a time. Nothing here allocates more than the *_bytes functions announce.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/cancel_token.h"
#include "kt_expert/layer.h"
#include "kt_expert/lora.h"
#include "kt_expert/routing.h"
#include "kt_expert/thread_pool.h"

namespace kt_expert {

struct KernelTable;
struct GemmScratch;

enum class FloatType { kBf16 = 0, kF32 = 1 };
constexpr std::int64_t size_of(FloatType type) { return type == FloatType::kBf16 ? 2 : 4; }

// A dense [tokens, H] matrix the caller owns.
struct TokensIn {
  const void* data = nullptr;
  FloatType type = FloatType::kBf16;
};
struct TokensOut {
  void* data = nullptr;
  FloatType type = FloatType::kBf16;
};

// The saved state of one forward, independent of every other: any number may live, consumed in any order.
// x is kept in the type it came in, the pre-activations in fp32: rounding them to bf16 would alone cost 1.7e-3 and push
// gradients past the numerics contract.
class Ticket {
 public:
  Ticket(const LayerSpec& layer, const LoraSpec& lora, Routing routing, FloatType type);

  const LayerSpec& layer() const { return layer_; }
  const LoraSpec& lora() const { return lora_; }
  const Routing& routing() const { return routing_; }
  FloatType type() const { return type_; }
  std::int64_t bytes() const;

 private:
  friend class Engine;
  LayerSpec layer_;
  LoraSpec lora_;
  Routing routing_;
  FloatType type_;
  AlignedBuffer<std::uint8_t> x_;  // [tokens, H]
  AlignedBuffer<float> gate_;      // [routes, I]
  AlignedBuffer<float> up_;        // [routes, I]
  AlignedBuffer<float> x_a_gate_;  // [routes, r] x A_gate^T
  AlignedBuffer<float> x_a_up_;    // [routes, r], empty where tied
  AlignedBuffer<float> h_a_down_;  // [routes, r] h A_down^T
};

struct ForwardArgs {
  const LayerWeights* weights = nullptr;
  const LoraTensors* lora = nullptr;  // null: base weights alone
  TokensIn x;
  Routing routing;
  TokensOut y;
  bool save = false;  // keep what a backward needs
  const CancelToken* token = nullptr;
};

struct BackwardArgs {
  const LayerWeights* weights = nullptr;
  const LoraTensors* lora = nullptr;  // as in the forward
  LoraTensors* gradients = nullptr;   // added to; null where `lora` is null
  const Ticket* ticket = nullptr;
  TokensIn dy;
  TokensOut dx;
  float* d_weights = nullptr;  // [tokens, top_k]
  const CancelToken* token = nullptr;
};

struct AdamWParams {
  double learning_rate = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  double grad_scale = 1.0;
  std::int64_t step = 1;  // 1 for the first update
};

class Engine {
 public:
  // `isa` empty: the best this machine has. Throws Unsupported for one it lacks.
  Engine(int threads, const std::string& isa);
  ~Engine();

  int threads() const { return pool_.size(); }
  const char* isa() const;
  const char* kernel() const;

  // Returns the ticket if `save`, else null.
  std::unique_ptr<Ticket> forward(const ForwardArgs& args);
  // Adds to `gradients` only after every step that can fail or be cancelled: a backward counts whole or not at all.
  void backward(const BackwardArgs& args);
  // gradients[rank] are summed in rank order, scaled, and applied. All sets share the parameters' shape.
  void adamw(const AdamWParams& params, const std::vector<const LoraTensors*>& gradients, LoraTensors& parameters,
             LoraTensors& exp_avg, LoraTensors& exp_avg_sq);
  // Sum of squares of scale * (sum over ranks of gradients).
  double gradient_square_sum(double scale, const std::vector<const LoraTensors*>& gradients);

  static std::int64_t ticket_bytes(const LayerSpec& layer, const LoraSpec& lora, std::int64_t tokens, int top_k,
                                   FloatType type);
  // Peak scratch of one forward or backward beside tickets and outputs.
  std::int64_t scratch_bytes(const LayerSpec& layer, const LoraSpec& lora, std::int64_t tokens, int top_k) const;

 private:
  class ForwardPass;
  class BackwardPass;
  class Arena;

  GemmScratch scratch_of(int worker);
  void release_scratch();

  const KernelTable& kernels_;
  ThreadPool pool_;
  AlignedBuffer<float> gemm_scratch_;
  std::unique_ptr<Arena> arena_;
  std::mutex mutex_;
};

}  // namespace kt_expert
