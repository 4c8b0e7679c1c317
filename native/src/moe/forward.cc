// y = sum over routes of w * down(act(gate(x)) * up(x)), LoRA folded into each projection's accumulator.
#include "kt_expert/error.h"
#include "moe/forward_pass.h"

namespace kt_expert {

Engine::ForwardPass::ForwardPass(Engine& engine, const ForwardArgs& args)
    : kernels_(engine.kernels_),
      engine_(engine),
      pool_(engine.pool_),
      args_(args),
      weights_(*args.weights),
      layer_(args.weights->spec()),
      routing_(args.routing) {}

std::int64_t Engine::ForwardPass::scratch_floats(const LayerSpec& layer, const LoraSpec& lora, std::int64_t tokens,
                                                 std::int64_t routes, int workers) {
  return Arena::padded(tokens * layer.hidden) + 3 * Arena::padded(routes * layer.intermediate) +
         Arena::padded(routes * layer.hidden) + Arena::padded(routes * lora.rank_gate) +
         Arena::padded(routes * lora.rank_up) + Arena::padded(routes * lora.rank_down) +
         Arena::padded(static_cast<std::int64_t>(workers) * layer.hidden);
}

std::unique_ptr<Ticket> Engine::ForwardPass::run() {
  const LoraSpec lora = args_.lora == nullptr ? LoraSpec{} : args_.lora->lora();
  const std::int64_t routes = routing_.routes;
  Arena& arena = *engine_.arena_;
  arena.reset(scratch_floats(layer_, lora, routing_.tokens, routes, pool_.size()));
  float* x_copy = arena.take(static_cast<std::int64_t>(routing_.tokens) * layer_.hidden);
  float* worker_rows = arena.take(static_cast<std::int64_t>(pool_.size()) * layer_.hidden);
  h_ = arena.take(routes * layer_.intermediate);
  down_ = arena.take(routes * layer_.hidden);
  std::unique_ptr<Ticket> ticket;
  if (args_.save) {
    // What the backward needs is computed straight into the ticket.
    ticket = std::make_unique<Ticket>(layer_, lora, routing_, args_.x.type);
    gate_ = ticket->gate_.data();
    up_ = ticket->up_.data();
    x_a_gate_ = ticket->x_a_gate_.data();
    x_a_up_ = lora.tied ? x_a_gate_ : ticket->x_a_up_.data();
    h_a_down_ = ticket->h_a_down_.data();
    std::copy_n(static_cast<const std::uint8_t*>(args_.x.data), ticket->x_.size(), ticket->x_.data());
  } else {
    gate_ = arena.take(routes * layer_.intermediate);
    up_ = arena.take(routes * layer_.intermediate);
    x_a_gate_ = arena.take(routes * lora.rank_gate);
    x_a_up_ = lora.tied ? x_a_gate_ : arena.take(routes * lora.rank_up);
    h_a_down_ = arena.take(routes * lora.rank_down);
  }

  x_ = as_f32(kernels_, pool_, args_.token, args_.x, routing_.tokens, layer_.hidden, x_copy);
  project_lora_inputs(lora);
  gate_up_and_activate(lora);
  project_h(lora);
  down(lora);
  combine_routes(kernels_, pool_, args_.token, routing_, down_, layer_.hidden, true, worker_rows, args_.y);
  return ticket;
}

void Engine::ForwardPass::project_lora_inputs(const LoraSpec& lora) {
  if (lora.rank_gate == 0 && lora.rank_up == 0) return;
  for_each_expert(pool_, routing_, args_.token, [&](int expert, int worker) {
    const GemmScratch scratch = engine_.scratch_of(worker);
    const auto project = [&](LoraTensor a, int rank, float* target) {
      if (rank == 0) return;
      const std::int64_t first = routing_.begin_of(expert);
      const int rows = routing_.rows_of(expert);
      float* out = target + first * rank;
      std::fill_n(out, static_cast<std::int64_t>(rows) * rank, 0.0f);
      gemm_accumulate(kernels_, rows, rank, layer_.hidden,
                      left_operand(x_, layer_.hidden, routing_.row_token.data() + first),
                      f32_operand(args_.lora->expert(a, expert), layer_.hidden, RightLayout::kNK), out, rank, scratch);
    };
    project(LoraTensor::kAGate, lora.rank_gate, x_a_gate_);
    if (!lora.tied) project(LoraTensor::kAUp, lora.rank_up, x_a_up_);
  });
}

void Engine::ForwardPass::fill_bias(Projection projection, int expert, Columns columns, int width, float* out) const {
  const float* bias = weights_.bias(projection, expert);
  for (int row = 0; row < routing_.rows_of(expert); ++row) {
    float* target = out + static_cast<std::int64_t>(row) * width;
    if (bias == nullptr) {
      std::fill_n(target, columns.count, 0.0f);
    } else {
      std::copy_n(bias + columns.first, columns.count, target);
    }
  }
}

void Engine::ForwardPass::gate_up_and_activate(const LoraSpec& lora) {
  const int width = layer_.intermediate;
  for_each_expert_block(pool_, routing_, width, args_.token, [&](int expert, Columns columns, int worker) {
    const GemmScratch scratch = engine_.scratch_of(worker);
    const std::int64_t first = routing_.begin_of(expert);
    const int rows = routing_.rows_of(expert);
    const auto project = [&](Projection projection, LoraTensor b, int rank, float scale, const float* x_a,
                             float* target) {
      float* out = target + first * width + columns.first;
      fill_bias(projection, expert, columns, width, out);
      gemm_accumulate(
          kernels_, rows, columns.count, layer_.hidden,
          left_operand(x_, layer_.hidden, routing_.row_token.data() + first),
          bf16_operand(weights_.matrix(projection, expert) + static_cast<std::int64_t>(columns.first) * layer_.hidden,
                       layer_.hidden, RightLayout::kNK),
          out, width, scratch);
      if (rank == 0) return;
      gemm_accumulate(kernels_, rows, columns.count, rank, left_operand(x_a + first * rank, rank, nullptr, scale),
                      f32_operand(args_.lora->expert(b, expert) + static_cast<std::int64_t>(columns.first) * rank, rank,
                                  RightLayout::kNK),
                      out, width, scratch);
    };
    project(Projection::kGate, LoraTensor::kBGate, lora.rank_gate, lora.scale_gate, x_a_gate_, gate_);
    project(Projection::kUp, LoraTensor::kBUp, lora.rank_up, lora.scale_up, x_a_up_, up_);
    for (int row = 0; row < rows; ++row) {
      const std::int64_t at = (first + row) * width + columns.first;
      kernels_.activate(layer_.activation, gate_ + at, up_ + at, h_ + at, columns.count);
    }
  });
}

void Engine::ForwardPass::project_h(const LoraSpec& lora) {
  const int rank = lora.rank_down;
  if (rank == 0) return;
  for_each_expert(pool_, routing_, args_.token, [&](int expert, int worker) {
    const std::int64_t first = routing_.begin_of(expert);
    const int rows = routing_.rows_of(expert);
    float* out = h_a_down_ + first * rank;
    std::fill_n(out, static_cast<std::int64_t>(rows) * rank, 0.0f);
    gemm_accumulate(kernels_, rows, rank, layer_.intermediate,
                    left_operand(h_ + first * layer_.intermediate, layer_.intermediate),
                    f32_operand(args_.lora->expert(LoraTensor::kADown, expert), layer_.intermediate, RightLayout::kNK),
                    out, rank, engine_.scratch_of(worker));
  });
}

void Engine::ForwardPass::down(const LoraSpec& lora) {
  const int width = layer_.hidden, depth = layer_.intermediate, rank = lora.rank_down;
  for_each_expert_block(pool_, routing_, width, args_.token, [&](int expert, Columns columns, int worker) {
    const GemmScratch scratch = engine_.scratch_of(worker);
    const std::int64_t first = routing_.begin_of(expert);
    const int rows = routing_.rows_of(expert);
    float* out = down_ + first * width + columns.first;
    fill_bias(Projection::kDown, expert, columns, width, out);
    gemm_accumulate(
        kernels_, rows, columns.count, depth, left_operand(h_ + first * depth, depth),
        bf16_operand(weights_.matrix(Projection::kDown, expert) + static_cast<std::int64_t>(columns.first) * depth,
                     depth, RightLayout::kNK),
        out, width, scratch);
    if (rank == 0) return;
    gemm_accumulate(
        kernels_, rows, columns.count, rank, left_operand(h_a_down_ + first * rank, rank, nullptr, lora.scale_down),
        f32_operand(args_.lora->expert(LoraTensor::kBDown, expert) + static_cast<std::int64_t>(columns.first) * rank,
                    rank, RightLayout::kNK),
        out, width, scratch);
  });
}

}  // namespace kt_expert
