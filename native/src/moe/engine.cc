#include "kt_expert/engine.h"

#include <utility>

#include "kt_expert/error.h"
#include "moe/backward_pass.h"
#include "moe/forward_pass.h"

namespace kt_expert {
namespace {

void require_same_layer(const LayerSpec& layer, const LayerSpec& other, const char* what) {
  if (layer.experts != other.experts || layer.hidden != other.hidden || layer.intermediate != other.intermediate) {
    throw InvalidArgument(std::string(what) + " belongs to a layer of another shape: E, H, I = " +
                          std::to_string(other.experts) + ", " + std::to_string(other.hidden) + ", " +
                          std::to_string(other.intermediate) + ", expected " + std::to_string(layer.experts) + ", " +
                          std::to_string(layer.hidden) + ", " + std::to_string(layer.intermediate));
  }
}

bool same_ranks(const LoraSpec& a, const LoraSpec& b) {
  return a.tied == b.tied && a.rank_gate == b.rank_gate && a.rank_up == b.rank_up && a.rank_down == b.rank_down;
}

}  // namespace

Ticket::Ticket(const LayerSpec& layer, const LoraSpec& lora, Routing routing, FloatType type)
    : layer_(layer), lora_(lora), routing_(std::move(routing)), type_(type) {
  const std::size_t element = static_cast<std::size_t>(size_of(type));
  const std::size_t routes = static_cast<std::size_t>(routing_.routes);
  const std::size_t inter = static_cast<std::size_t>(layer.intermediate);
  x_ = AlignedBuffer<std::uint8_t>(static_cast<std::size_t>(routing_.tokens) * static_cast<std::size_t>(layer.hidden) *
                                   element);
  gate_ = AlignedBuffer<float>(routes * inter);
  up_ = AlignedBuffer<float>(routes * inter);
  x_a_gate_ = AlignedBuffer<float>(routes * static_cast<std::size_t>(lora.rank_gate));
  x_a_up_ = AlignedBuffer<float>(lora.tied ? 0 : routes * static_cast<std::size_t>(lora.rank_up));
  h_a_down_ = AlignedBuffer<float>(routes * static_cast<std::size_t>(lora.rank_down));
}

std::int64_t Ticket::bytes() const {
  const std::size_t floats = gate_.size() + up_.size() + x_a_gate_.size() + x_a_up_.size() + h_a_down_.size();
  return static_cast<std::int64_t>(x_.size() + floats * sizeof(float)) +
         routing_bytes(routing_.tokens, routing_.top_k, layer_.experts);
}

Engine::Engine(int threads, const std::string& isa)
    : kernels_(kernels_for(choose_isa(isa))),
      pool_(threads),
      gemm_scratch_(static_cast<std::size_t>(gemm_scratch_floats(kernels_) * threads)),
      arena_(std::make_unique<Arena>()) {}

Engine::~Engine() = default;

const char* Engine::isa() const { return isa_name(kernels_.isa); }
const char* Engine::kernel() const { return kernels_.name; }

GemmScratch Engine::scratch_of(int worker) {
  return gemm_scratch_at(kernels_, gemm_scratch_.data() + worker * gemm_scratch_floats(kernels_));
}

std::unique_ptr<Ticket> Engine::forward(const ForwardArgs& args) {
  if (args.lora != nullptr) require_same_layer(args.weights->spec(), args.lora->layer(), "the adapter");
  std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<Ticket> ticket = ForwardPass(*this, args).run();
  arena_->trim();
  return ticket;
}

void Engine::backward(const BackwardArgs& args) {
  require_same_layer(args.weights->spec(), args.ticket->layer(), "the ticket");
  if (args.lora != nullptr) {
    if (args.gradients == nullptr) throw InvalidArgument("a backward with an adapter needs gradients to add to");
    require_same_layer(args.weights->spec(), args.lora->layer(), "the adapter");
    if (!same_ranks(args.lora->lora(), args.ticket->lora()) || !same_ranks(args.lora->lora(), args.gradients->lora())) {
      throw InvalidArgument("the ticket or the gradients were made for an adapter of other ranks");
    }
  } else if (args.ticket->lora().any()) {
    throw InvalidArgument("the ticket was saved with an adapter; give the same adapter to backward");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  BackwardPass(*this, args).run();
  arena_->trim();
}

std::int64_t Engine::ticket_bytes(const LayerSpec& layer, const LoraSpec& lora, std::int64_t tokens, int top_k,
                                  FloatType type) {
  const std::int64_t routes = tokens * top_k;
  const std::int64_t ranks = lora.rank_gate + (lora.tied ? 0 : lora.rank_up) + lora.rank_down;
  return tokens * layer.hidden * size_of(type) +
         routes * (2 * layer.intermediate + ranks) * static_cast<std::int64_t>(sizeof(float)) +
         routing_bytes(tokens, top_k, layer.experts);
}

std::int64_t Engine::scratch_bytes(const LayerSpec& layer, const LoraSpec& lora, std::int64_t tokens, int top_k) const {
  const std::int64_t routes = tokens * top_k;
  const std::int64_t floats = std::max(ForwardPass::scratch_floats(layer, lora, tokens, routes, pool_.size()),
                                       BackwardPass::scratch_floats(layer, lora, tokens, routes, pool_.size()));
  return floats * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace kt_expert
