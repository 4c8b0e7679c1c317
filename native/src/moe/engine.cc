#include "kt_expert/engine.h"

#include <algorithm>
#include <utility>

#include "kt_expert/error.h"
#include "kt_expert/topology.h"
#include "moe/backward.h"
#include "moe/forward.h"

namespace kt_expert {
namespace {

void require_same_layer(const LayerSpec& layer, const LayerSpec& other, const char* what) {
  if (layer.activation.kind != other.activation.kind) {
    throw InvalidArgument(std::string(what) + " belongs to a layer with another activation");
  }
  if (layer.experts != other.experts || layer.hidden != other.hidden || layer.intermediate != other.intermediate) {
    throw InvalidArgument(std::string(what) + " belongs to a layer of another shape: E, H, I = " +
                          std::to_string(other.experts) + ", " + std::to_string(other.hidden) + ", " +
                          std::to_string(other.intermediate) + ", expected " + std::to_string(layer.experts) + ", " +
                          std::to_string(layer.hidden) + ", " + std::to_string(layer.intermediate));
  }
}

bool same_adapter(const AdapterSpec& a, const AdapterSpec& b) {
  return a.tied == b.tied && a.rank_gate == b.rank_gate && a.rank_up == b.rank_up && a.rank_down == b.rank_down &&
         a.dropout == b.dropout;
}

// Floats of one ticket's matrices, or, with `base`, where they lie.
std::int64_t lay_out(const LayerSpec& layer, const AdapterSpec& lora, std::int64_t routes, SavePolicy policy,
                     float* base, HiddenStore* store) {
  if (policy != SavePolicy::kActivations) return 0;
  std::int64_t used = 0;
  const auto place = [&](std::int64_t floats, float*& member) {
    if (floats == 0) return;
    if (base != nullptr) member = base + used;
    used += align_up(floats, kPanelColumns);
  };
  HiddenStore placed;
  const std::int64_t hidden = routes * layer.intermediate;
  place(has_gate(layer.activation.kind) ? hidden : 0, placed.gate);
  place(hidden, placed.up);
  place(routes * rank_stride(lora.rank_gate), placed.x_a_gate);
  place(lora.tied ? 0 : routes * rank_stride(lora.rank_up), placed.x_a_up);
  place(routes * rank_stride(lora.rank_down), placed.h_a_down);
  if (store != nullptr) *store = placed;
  return used;
}

}  // namespace

Ticket::Ticket(const LayerSpec& layer, const AdapterSpec& lora, Routing routing, FloatType type, SavePolicy policy,
               DropoutSeed dropout, std::shared_ptr<TicketMemory> memory)
    : layer_(layer),
      lora_(lora),
      routing_(std::move(routing)),
      type_(type),
      policy_(policy),
      dropout_(dropout),
      memory_(std::move(memory)),
      x_(memory_->take(static_cast<std::size_t>(std::int64_t{routing_.tokens} * layer.hidden * size_of(type)))),
      hidden_(memory_->take(static_cast<std::size_t>(lay_out(layer, lora, routing_.routes, policy, nullptr, nullptr)) *
                            sizeof(float))) {
  lay_out(layer, lora, routing_.routes, policy, reinterpret_cast<float*>(hidden_.data()), &store_);
}

Ticket::~Ticket() {
  memory_->give(std::move(x_));
  memory_->give(std::move(hidden_));
}

std::int64_t Ticket::bytes() const {
  return static_cast<std::int64_t>(x_.size() + hidden_.size()) +
         routing_bytes(routing_.tokens, routing_.top_k, layer_.experts);
}

namespace {

// The cores of every node; empty sets where the nodes are none of the machine's.
std::vector<std::vector<int>> node_cpus(int nodes, const std::vector<int>& ids) {
  std::vector<std::vector<int>> cpus;
  if (ids.empty()) return std::vector<std::vector<int>>(static_cast<std::size_t>(std::max(0, nodes)));
  if (static_cast<int>(ids.size()) != nodes) {
    throw InvalidArgument(std::to_string(ids.size()) + " memory nodes are named for " + std::to_string(nodes));
  }
  const std::vector<MemoryNode> machine = memory_nodes();
  for (const int id : ids) {
    const auto found =
        std::find_if(machine.begin(), machine.end(), [&](const MemoryNode& node) { return node.id == id; });
    if (found == machine.end()) {
      throw InvalidArgument("memory node " + std::to_string(id) + " has no core this process may run on");
    }
    cpus.push_back(found->cpus);
  }
  return cpus;
}

}  // namespace

Engine::Engine(int threads, const std::string& isa, int nodes, const std::vector<int>& memory_nodes)
    : reason_(explain_choice(isa)),
      kernels_(kernels_for(choose_isa(isa))),
      fp32_kernels_(kernels_.operand == OperandType::kF32 ? kernels_ : kernels_for(Isa::kAvx512)),
      worker_bytes_(std::max(WorkerScratch::bytes(kernels_), WorkerScratch::bytes(fp32_kernels_))),
      pool_(threads, node_cpus(nodes, memory_nodes)),
      worker_scratch_(static_cast<std::size_t>(worker_bytes_ * threads)),
      arena_(std::make_unique<Arena>()),
      ticket_memory_(std::make_shared<TicketMemory>()) {}

Engine::~Engine() = default;

std::int64_t Engine::kept_bytes() const { return ticket_memory_->kept_bytes() + arena_->kept_bytes(); }

void Engine::drop_kept() {
  ticket_memory_->drop();
  const std::unique_lock<std::mutex> idle(mutex_, std::try_to_lock);
  if (idle.owns_lock()) arena_->drop();
}

const char* Engine::isa() const { return isa_name(kernels_.isa); }
const char* Engine::kernel(WeightFormat format, FloatType tokens) const {
  const KernelTable& kernels = kernels_for_tokens(tokens);
  return kernels.integer != nullptr && format == WeightFormat::kInt8 ? kernels.integer->name : kernels.name;
}

const KernelTable& Engine::kernels_for_tokens(FloatType type) const {
  return type == FloatType::kF32 ? fp32_kernels_ : kernels_;
}

WorkerScratch Engine::worker_scratch(int worker) {
  return WorkerScratch::at(worker_scratch_.data() + worker * worker_bytes_);
}

namespace {

void require_one(bool is_one, const char* what) {
  if (!is_one) throw InvalidArgument(std::string("batches that are computed together have ") + what);
}

void require_valid(const ForwardArgs& args) {
  if (args.lora != nullptr) require_same_layer(args.weights->spec(), args.lora->layer(), "the adapter");
}

void require_valid(const BackwardArgs& args) {
  require_same_layer(args.weights->spec(), args.ticket->layer(), "the ticket");
  if (args.lora != nullptr) {
    require_same_layer(args.weights->spec(), args.lora->layer(), "the adapter");
    if (args.gradients != nullptr) {
      require_same_layer(args.weights->spec(), args.gradients->layer(), "the gradients' set");
    }
    if (!same_adapter(args.lora->spec(), args.ticket->lora()) ||
        (args.gradients != nullptr && !same_adapter(args.lora->spec(), args.gradients->spec()))) {
      throw InvalidArgument("the ticket or the gradients were made for an adapter of other ranks or another dropout");
    }
  } else if (args.ticket->lora().any()) {
    throw InvalidArgument("the ticket was saved with an adapter; give the same adapter to backward");
  }
  if (args.weight_gradients != nullptr) {
    require_same_layer(args.weights->spec(), args.weight_gradients->layer(), "the gradients' set");
    if (!args.weight_gradients->spec().full) throw InvalidArgument("gradients of weights go to a set of weights");
  }
}

// Where a set of gradients would be written twice, the order would be nobody's.
void require_own_gradients(const BackwardArgs& one, const BackwardArgs& other) {
  require_one(one.gradients == nullptr || one.gradients != other.gradients, "the same gradients");
  require_one(one.weight_gradients == nullptr || one.weight_gradients != other.weight_gradients, "the same gradients");
}

}  // namespace

std::unique_ptr<Ticket> Engine::forward(const ForwardArgs& args) {
  require_valid(args);
  std::lock_guard<std::mutex> lock(mutex_);
  return std::move(ForwardPass::run(*this, {&args, 1}).front());
}

void Engine::backward(const BackwardArgs& args) {
  require_valid(args);
  std::lock_guard<std::mutex> lock(mutex_);
  BackwardPass::run(*this, {&args, 1});
}

std::vector<std::unique_ptr<Ticket>> Engine::forward_together(Span<const ForwardArgs> batches) {
  if (batches.empty()) return {};
  for (const ForwardArgs& each : batches) {
    require_valid(each);
    require_one(each.weights == batches[0].weights, "different weights");
    require_one(each.x.type == batches[0].x.type && each.y.type == batches[0].y.type, "tokens of different types");
    require_one(each.token == nullptr, "a cancel token");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  return ForwardPass::run(*this, batches);
}

void Engine::backward_together(Span<const BackwardArgs> batches) {
  for (std::size_t b = 0; b < batches.size(); ++b) {
    const BackwardArgs& each = batches[b];
    require_valid(each);
    require_one(each.weights == batches[0].weights, "different weights");
    require_one(each.ticket->type() == batches[0].ticket->type() && each.dy.type == batches[0].dy.type &&
                    each.dx.type == batches[0].dx.type,
                "tokens of different types");
    require_one(each.ticket->policy() == batches[0].ticket->policy(), "tickets of different policies");
    require_one(each.token == nullptr, "a cancel token");
    for (std::size_t before = 0; before < b; ++before) require_own_gradients(each, batches[before]);
  }
  if (batches.empty()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  BackwardPass::run(*this, batches);
}

StageTimes Engine::last_stages() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return last_stages_;
}

const char* stage_name(Stage stage) {
  static constexpr const char* kNames[kStages] = {"gather", "gate_up", "activation", "down",
                                                  "lora",   "scatter", "gradients"};
  return kNames[static_cast<std::size_t>(stage)];
}

std::int64_t Engine::ticket_bytes(const LayerSpec& layer, const AdapterSpec& lora, std::int64_t tokens, int top_k,
                                  FloatType type, SavePolicy policy) {
  const std::int64_t floats = lay_out(layer, lora, tokens * top_k, policy, nullptr, nullptr);
  return tokens * layer.hidden * size_of(type) + floats * static_cast<std::int64_t>(sizeof(float)) +
         routing_bytes(tokens, top_k, layer.experts);
}

std::int64_t Engine::scratch_bytes(const LayerSpec& layer, const AdapterSpec& lora, std::int64_t tokens, int top_k,
                                   bool trains_weights) const {
  const std::vector<BatchSize> one = {{lora, tokens, tokens * top_k}};
  std::int64_t most = 0;
  for (const KernelTable* kernels : {&kernels_, &fp32_kernels_}) {
    most = std::max({most, ForwardPass::scratch_bytes(*kernels, layer, one, nodes(), threads()),
                     BackwardPass::scratch_bytes(*kernels, layer, one, nodes(), threads(), trains_weights)});
  }
  return most;
}

}  // namespace kt_expert
