// y = sum over routes of w * down(act(gate(x)) * up(x)), LoRA added into each projection's accumulator.
#include "moe/forward.h"

#include <utility>

namespace kt_expert {

namespace {

std::vector<Batch> batches_of(Span<const ForwardArgs> args) {
  std::vector<Batch> batches;
  for (const ForwardArgs& each : args) {
    AdapterSpec lora;
    if (each.lora != nullptr) lora = each.scales ? each.lora->spec().scaled(*each.scales) : each.lora->spec();
    batches.push_back({each.lora, lora, &each.routing, each.dropout});
  }
  return batches;
}

}  // namespace

Engine::ForwardPass::ForwardPass(Engine& engine, Span<const ForwardArgs> args, std::vector<Batch> batches,
                                 StageClock& clock, Carver& carver, std::vector<HiddenStore> stores)
    : HiddenPass(engine, args[0].x.type, *args[0].weights, std::move(batches), args[0].token, clock, carver,
                 std::move(stores)) {
  sums_ = TokenSums::take(carver, plan_.tokens(), layer_.hidden, static_cast<int>(weights_.slices().size()),
                          args[0].y.type);
}

std::int64_t Engine::ForwardPass::scratch_bytes(const KernelTable& kernels, const LayerSpec& layer,
                                                const std::vector<BatchSize>& batches, int nodes, int workers) {
  Carver carver(nullptr);
  HiddenPass::reserve(carver, kernels, layer, batches, workers);
  TokenSums::take(carver, sum_of(batches).tokens, layer.hidden, nodes, FloatType::kBf16);
  return carver.used();
}

std::vector<std::unique_ptr<Ticket>> Engine::ForwardPass::run(Engine& engine, Span<const ForwardArgs> args) {
  const LayerWeights& weights = *args[0].weights;
  std::vector<Batch> batches = batches_of(args);
  const Arena::Lease lease(*engine.arena_,
                           scratch_bytes(engine.kernels_for_tokens(args[0].x.type), weights.spec(), sizes_of(batches),
                                         static_cast<int>(weights.slices().size()), engine.threads()));
  Carver carver(lease.data());
  std::vector<std::unique_ptr<Ticket>> tickets(args.size());
  std::vector<HiddenStore> stores(args.size());
  std::vector<TokensIn> x;
  std::vector<TokensOut> y;
  for (std::size_t b = 0; b < args.size(); ++b) {
    const ForwardArgs& each = args[b];
    x.push_back(each.x);
    y.push_back(each.y);
    if (each.save == SavePolicy::kNothing) continue;
    tickets[b] = std::make_unique<Ticket>(weights.spec(), batches[b].lora, each.routing, each.x.type, each.save,
                                          each.dropout, engine.ticket_memory_);
    stores[b] = tickets[b]->store();
    std::copy_n(static_cast<const std::uint8_t*>(each.x.data), tickets[b]->x_.size(), tickets[b]->x_.data());
  }
  StageClock clock(engine.threads());
  ForwardPass pass(engine, args, std::move(batches), clock, carver, std::move(stores));
  pass.HiddenPass::run(x);
  clock.run_mixed([&] { pass.down(y); });
  engine.last_stages_ = clock.total();
  return tickets;
}

void Engine::ForwardPass::down(const std::vector<TokensOut>& y) {
  sum_over_routes(
      sums_, y, [&](const BlockTask& at, float* block) { down_block(at, block); },
      [&](const BatchRows& rows, std::size_t row) { return batches_[rows.batch].routing->row_weight[row]; });
}

void Engine::ForwardPass::down_block(const BlockTask& at, float* block) const {
  const RowTask& task = at.rows;
  const bool first_slice = is_first(at.slice);
  const float* bias = weights_.bias(Projection::kDown, task.expert);
  for (int m = 0; first_slice && bias != nullptr && m < task.count; ++m) {
    std::copy_n(bias + at.first_column, at.columns, block_row(block, m));
  }
  multiply_hidden(at, block);
  clock_.lap(at.worker, Stage::kDown);
  if (!first_slice) return;
  for (const BatchRows& rows : task.batches) {
    const Batch& batch = batches_[rows.batch];
    const int rank = batch.lora.rank_down;
    if (rank == 0) continue;
    const float* b = batch.adapter->expert(AdapterTensor::kBDown, task.expert) + std::int64_t{at.first_column} * rank;
    add_lora(at, rows, h_a_down(rows.batch), {b, rank, RightLayout::kNK}, block);
  }
  clock_.lap(at.worker, Stage::kLora);
}

}  // namespace kt_expert
