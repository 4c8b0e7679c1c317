// y = sum over routes of w * down(act(gate(x)) * up(x)), LoRA added into each projection's accumulator.
#include "moe/forward.h"

namespace kt_expert {

Engine::ForwardPass::ForwardPass(Engine& engine, const ForwardArgs& args, const AdapterSpec& lora, Carver& carver,
                                 const HiddenStore& store)
    : HiddenPass(engine, args.x.type, *args.weights, args.lora, lora, args.routing, args.token, args.dropout, carver,
                 store),
      args_(args) {
  sums_ =
      TokenSums::take(carver, routing_.tokens, layer_.hidden, static_cast<int>(weights_.slices().size()), args.y.type);
}

std::int64_t Engine::ForwardPass::scratch_bytes(const KernelTable& kernels, const LayerSpec& layer,
                                                const AdapterSpec& lora, std::int64_t tokens, std::int64_t routes,
                                                int nodes, int workers) {
  Carver carver(nullptr);
  HiddenPass::reserve(carver, kernels, layer, lora, tokens, routes, workers);
  TokenSums::take(carver, tokens, layer.hidden, nodes, FloatType::kBf16);
  return carver.used();
}

std::unique_ptr<Ticket> Engine::ForwardPass::run(Engine& engine, const ForwardArgs& args) {
  const LayerSpec& layer = args.weights->spec();
  AdapterSpec lora;
  if (args.lora != nullptr) lora = args.scales ? args.lora->spec().scaled(*args.scales) : args.lora->spec();
  const std::int64_t needed =
      scratch_bytes(engine.kernels_for_tokens(args.x.type), layer, lora, args.routing.tokens, args.routing.routes,
                    static_cast<int>(args.weights->slices().size()), engine.threads());
  const Arena::Lease lease(*engine.arena_, needed);
  Carver carver(lease.data());
  std::unique_ptr<Ticket> ticket;
  HiddenStore store;
  if (args.save != SavePolicy::kNothing) {
    ticket = std::make_unique<Ticket>(layer, lora, args.routing, args.x.type, args.save, args.dropout,
                                      engine.ticket_memory_);
    store = ticket->store();
    std::copy_n(static_cast<const std::uint8_t*>(args.x.data), ticket->x_.size(), ticket->x_.data());
  }
  ForwardPass pass(engine, args, lora, carver, store);
  pass.HiddenPass::run(args.x);
  pass.down();
  return ticket;
}

void Engine::ForwardPass::down() {
  sum_over_routes(
      sums_, args_.y, [&](const BlockTask& at, float* block) { down_block(at, block); },
      [&](std::size_t row) { return routing_.row_weight[row]; });
}

void Engine::ForwardPass::down_block(const BlockTask& at, float* block) const {
  const RowTask& task = at.rows;
  const bool first_slice = is_first(at.slice);
  const float* bias = weights_.bias(Projection::kDown, task.expert);
  for (int m = 0; first_slice && bias != nullptr && m < task.count; ++m) {
    std::copy_n(bias + at.first_column, at.columns, block_row(block, m));
  }
  multiply_hidden(at, block);
  const int rank = lora_.rank_down;
  if (!first_slice || rank == 0) return;
  const float* b = adapter_->expert(AdapterTensor::kBDown, task.expert) + std::int64_t{at.first_column} * rank;
  multiply_lora(task, h_a_down(), {b, rank, RightLayout::kNK}, at.columns, block, at.worker);
}

}  // namespace kt_expert
