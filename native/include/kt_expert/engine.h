// The compute engine: forward, backward and optimizer step of MoE layers on one team of workers.
//
// One operation runs at a time. Nothing here allocates more than the *_bytes functions announce; scratch and memory of
// past tickets are kept for later ones until they are dropped.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "kt_expert/adapter.h"
#include "kt_expert/aligned_buffer.h"
#include "kt_expert/cancel_token.h"
#include "kt_expert/layer.h"
#include "kt_expert/optimizer.h"
#include "kt_expert/routing.h"
#include "kt_expert/span.h"
#include "kt_expert/stage_times.h"
#include "kt_expert/thread_pool.h"
#include "kt_expert/ticket_memory.h"

namespace kt_expert {

struct KernelTable;
struct WorkerScratch;

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

// What a forward keeps for its backward. kInputs costs a second gate-and-up product in the backward, whose bits are
// those of the first, and saves two fp32 matrices of [routes, I].
enum class SavePolicy { kNothing = 0, kActivations = 1, kInputs = 2 };

// Matrices a backward reads, fp32, [routes, ...]. LoRA intermediates carry their scale, and their rows are as wide as
// the rank rounded up to 16.
struct HiddenStore {
  float* gate = nullptr;      // [routes, I] before the activation
  float* up = nullptr;        // [routes, I]
  float* x_a_gate = nullptr;  // scale * x A_gate^T
  float* x_a_up = nullptr;    // null where tied
  float* h_a_down = nullptr;  // scale * h A_down^T
};

// What decides a forward's dropout beside the adapter's probability. Where a value stands in the batch, the layer and
// this seed give the mask, so the same request drops the same values again.
struct DropoutSeed {
  std::uint64_t seed = 0;  // 0: nothing is dropped, as in evaluation
  std::uint32_t layer = 0;
  std::uint32_t first_token = 0;  // of its batch: where a batch is computed in parts, each drops what the whole would
};

// The saved state of one forward, independent of every other: any number may live, consumed in any order.
// x is kept in the type it came in, the pre-activations in fp32: rounding them to bf16 would alone cost 1.7e-3 and push
// gradients past the numerics contract.
class Ticket {
 public:
  Ticket(const LayerSpec& layer, const AdapterSpec& lora, Routing routing, FloatType type, SavePolicy policy,
         DropoutSeed dropout, std::shared_ptr<TicketMemory> memory);
  ~Ticket();
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

  const LayerSpec& layer() const { return layer_; }
  const AdapterSpec& lora() const { return lora_; }
  const Routing& routing() const { return routing_; }
  FloatType type() const { return type_; }
  SavePolicy policy() const { return policy_; }
  DropoutSeed dropout() const { return dropout_; }
  TokensIn x() const { return {x_.data(), type_}; }
  // A ticket is written by the forward that makes it and only read afterwards.
  HiddenStore store() const { return store_; }
  std::int64_t bytes() const;

 private:
  friend class Engine;
  LayerSpec layer_;
  AdapterSpec lora_;
  Routing routing_;
  FloatType type_;
  SavePolicy policy_;
  DropoutSeed dropout_;
  std::shared_ptr<TicketMemory> memory_;
  TicketMemory::Buffer x_;       // [tokens, H]
  TicketMemory::Buffer hidden_;  // what store_ points into
  HiddenStore store_;
};

struct ForwardArgs {
  const LayerWeights* weights = nullptr;
  const AdapterTensors* lora = nullptr;  // null: base weights alone
  std::optional<AdapterScales> scales;   // in place of the adapter's own
  TokensIn x;
  Routing routing;
  TokensOut y;
  SavePolicy save = SavePolicy::kNothing;
  const CancelToken* token = nullptr;
  DropoutSeed dropout;
};

struct BackwardArgs {
  const LayerWeights* weights = nullptr;
  const AdapterTensors* lora = nullptr;          // as in the forward
  AdapterTensors* gradients = nullptr;           // of LoRA; null where none are wanted
  AdapterTensors* weight_gradients = nullptr;    // of the weights; null where none are wanted
  AdapterTensorSet wanted = kAllAdapterTensors;  // those that are added to
  AdapterTensorSet replaced = 0;                 // of these, those that forget what they held, with the same promise
  const Ticket* ticket = nullptr;
  TokensIn dy;
  TokensOut dx;
  float* d_weights = nullptr;  // [tokens, top_k]
  const CancelToken* token = nullptr;
};

// One layer's part in an optimizer step.
struct LayerUpdate {
  LayerStep step;
  std::vector<const AdapterTensors*> gradients;  // by rank
  AdapterTensors* parameters = nullptr;
  OptimizerState* state = nullptr;
  LayerWeights* weights = nullptr;  // what passes use of parameters that are weights: follows them
};

// Throws InvalidArgument unless `tensors` are all weights of a layer of the same shape, which is kept in bf16.
void require_trained(const LayerWeights& weights, const AdapterTensors& tensors);

// What a norm is made of. kPowers: the sum of |g|^p; kLargest, kSmallest: of |g|; kNonzeros: how many are not zero.
enum class NormKind { kPowers, kLargest, kSmallest, kNonzeros };

class Engine {
 public:
  // `isa` empty: the best this machine has. Throws Unsupported for one it lacks. `nodes` memory nodes share the
  // threads; 1 unless weights are split. With `memory_nodes`, ids of as many of the machine's own, threads stay near
  // them.
  Engine(int threads, const std::string& isa, int nodes, const std::vector<int>& memory_nodes = {});
  ~Engine();

  int threads() const { return pool_.size(); }
  int nodes() const { return pool_.nodes(); }
  // The ISA for bf16 tokens, and the one for fp32 tokens: ISAs that multiply bf16 would round those, so fp32 tokens
  // are left to the AVX-512 ISA.
  const char* isa() const;
  // What multiplies tokens with weights of a format.
  const char* kernel(WeightFormat format, FloatType tokens) const;
  // Why this ISA.
  const std::string& reason() const { return reason_; }

  // Returns a ticket unless nothing is saved, else null.
  std::unique_ptr<Ticket> forward(const ForwardArgs& args);
  // Adds to gradients only after every step that can fail or be cancelled: a backward counts whole or not at all.
  void backward(const BackwardArgs& args);
  // The same for several batches that share one reading of the weights: each gets the bits it would get alone. Their
  // tokens are of one type, and backwards' tickets of one save policy. None has a cancel token: either all count or
  // none. Memory: no more than the sum of what each would take. Throws InvalidArgument for batches that do not fit
  // together.
  std::vector<std::unique_ptr<Ticket>> forward_together(Span<const ForwardArgs> batches);
  void backward_together(Span<const BackwardArgs> batches);
  // Of every layer, gradients are summed in rank order, scaled, and applied. Throws InvalidArgument where shapes differ
  // or a tensor's update is of another kind than the state. Everything is checked and all memory taken before the first
  // write: a step counts whole or not at all.
  void step(const std::vector<LayerUpdate>& layers);
  // The values of `weights`, as passes use them, in fp32. Throws InvalidArgument for tensors that are not the weights
  // of such a layer.
  void decode_weights(const LayerWeights& weights, AdapterTensors& into);
  // The reverse, for some experts, rounded to nearest. Throws InvalidArgument for weights in another format than bf16.
  void encode_weights(const AdapterTensors& from, int first_expert, int experts, LayerWeights& into);
  // Memory kept for operations to come: scratch of past ones and of tickets that are gone.
  std::int64_t kept_bytes() const;
  // Gives it back to the system, but for scratch while an operation runs.
  void drop_kept();
  // Of the last forward or backward that ended well, or of those that were computed together.
  StageTimes last_stages() const;
  // For each tensor, of scale * (sum over ranks of gradients); 0 for one that is not there. `power` is for
  // kPowers.
  std::array<double, kAdapterTensors> gradient_norms(NormKind kind, double power, double scale,
                                                     const std::vector<const AdapterTensors*>& gradients);

  // What this machine gives the engine's threads together, measured now: the peak of the ISA's multiply-adds
  // (flop per second), of reading memory, and of changing it in place (bytes per second read and written, of 256 MiB).
  double measure_peak_flops();
  double measure_read_bandwidth();
  double measure_update_bandwidth();

  static std::int64_t ticket_bytes(const LayerSpec& layer, const AdapterSpec& lora, std::int64_t tokens, int top_k,
                                   FloatType type, SavePolicy policy);
  // Peak scratch of one forward or backward beside tickets and outputs; more where weights are trained.
  std::int64_t scratch_bytes(const LayerSpec& layer, const AdapterSpec& lora, std::int64_t tokens, int top_k,
                             bool trains_weights = false) const;
  // Peak scratch of a step or a norm over one layer; that of several layers is the largest.
  static std::int64_t step_bytes(const LayerSpec& layer, const AdapterSpec& lora, OptimizerKind kind, int ranks,
                                 int threads);

 private:
  class Pass;
  class HiddenPass;
  class ForwardPass;
  class BackwardPass;
  class Arena;

  void encode(const AdapterTensors& from, int first_expert, int experts, LayerWeights& into);
  const KernelTable& kernels_for_tokens(FloatType type) const;
  WorkerScratch worker_scratch(int worker);
  double measure_sweeps(int passes, const std::function<void(float*, std::int64_t)>& body);

  const std::string reason_;
  const KernelTable& kernels_;
  const KernelTable& fp32_kernels_;
  const std::int64_t worker_bytes_;
  ThreadPool pool_;
  AlignedBuffer<std::uint8_t> worker_scratch_;
  std::unique_ptr<Arena> arena_;
  std::shared_ptr<TicketMemory> ticket_memory_;
  StageTimes last_stages_ = {};
  mutable std::mutex mutex_;
};

}  // namespace kt_expert
