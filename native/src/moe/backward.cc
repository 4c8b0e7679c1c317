// Gradients of x, of the routing weights and of the LoRA tensors, from a ticket and dy. The routing weight enters after
// the products, so nothing is rounded for its sake: with p = W_down^T dy (+ LoRA), d_w = <h, p> (+ <bias_down, dy>) and
// d_h = w * p.
#include <algorithm>

#include "kt_expert/error.h"
#include "moe/backward_pass.h"

namespace kt_expert {

Engine::BackwardPass::BackwardPass(Engine& engine, const BackwardArgs& args)
    : kernels_(engine.kernels_),
      engine_(engine),
      pool_(engine.pool_),
      args_(args),
      weights_(*args.weights),
      layer_(args.weights->spec()),
      ticket_(*args.ticket),
      routing_(args.ticket->routing()),
      lora_(args.lora == nullptr ? LoraSpec{} : args.lora->lora()) {}

std::int64_t Engine::BackwardPass::scratch_floats(const LayerSpec& layer, const LoraSpec& lora, std::int64_t tokens,
                                                  std::int64_t routes, int workers) {
  return 2 * Arena::padded(tokens * layer.hidden) + 4 * Arena::padded(routes * layer.intermediate) +
         Arena::padded(routes * layer.hidden) + Arena::padded(routes * lora.rank_gate) +
         Arena::padded(routes * lora.rank_up) + 2 * Arena::padded(routes * lora.rank_down) + Arena::padded(routes) +
         Arena::padded(static_cast<std::int64_t>(workers) * layer.hidden);
}

void Engine::BackwardPass::run() {
  restore();
  recompute_h();
  project_dy();
  d_h();
  route_gradients();
  project_gate_up();
  d_x();
  combine_routes(kernels_, pool_, args_.token, routing_, d_x_rows_, layer_.hidden, false, worker_rows_, args_.dx);
  if (args_.token != nullptr) args_.token->check();
  // Nothing below can fail or be cancelled.
  write_d_weights();
  accumulate_lora_gradients();
}

void Engine::BackwardPass::restore() {
  const std::int64_t routes = routing_.routes, tokens = routing_.tokens;
  const std::int64_t routes_i = routes * layer_.intermediate;
  Arena& arena = *engine_.arena_;
  arena.reset(scratch_floats(layer_, lora_, tokens, routes, pool_.size()));
  float* x_copy = arena.take(tokens * layer_.hidden);
  float* dy_copy = arena.take(tokens * layer_.hidden);
  d_gate_ = arena.take(routes_i);
  d_up_ = arena.take(routes_i);
  h_ = arena.take(routes_i);
  d_h_ = arena.take(routes_i);
  d_x_rows_ = arena.take(routes * layer_.hidden);
  d_gate_b_ = arena.take(routes * lora_.rank_gate);
  d_up_b_ = arena.take(routes * lora_.rank_up);
  dy_b_down_ = arena.take(routes * lora_.rank_down);
  weighted_h_a_ = arena.take(routes * lora_.rank_down);
  row_d_weight_ = arena.take(routes);
  worker_rows_ = arena.take(static_cast<std::int64_t>(pool_.size()) * layer_.hidden);
  x_ = as_f32(kernels_, pool_, args_.token, TokensIn{ticket_.x_.data(), ticket_.type_}, tokens, layer_.hidden, x_copy);
  dy_ = as_f32(kernels_, pool_, args_.token, args_.dy, tokens, layer_.hidden, dy_copy);
}

void Engine::BackwardPass::recompute_h() {
  const std::int64_t width = layer_.intermediate;
  for_each_rows(pool_, routing_.routes, args_.token, [&](std::int64_t first, std::int64_t last, int) {
    const std::int64_t at = first * width;
    kernels_.activate(layer_.activation, ticket_.gate_.data() + at, ticket_.up_.data() + at, h_ + at,
                      (last - first) * width);
  });
}

void Engine::BackwardPass::project_dy() {
  const int rank = lora_.rank_down;
  if (rank == 0) return;
  for_each_expert(pool_, routing_, args_.token, [&](int expert, int worker) {
    const std::int64_t first = routing_.begin_of(expert);
    const int rows = routing_.rows_of(expert);
    float* out = dy_b_down_ + first * rank;
    std::fill_n(out, static_cast<std::int64_t>(rows) * rank, 0.0f);
    gemm_accumulate(kernels_, rows, rank, layer_.hidden,
                    left_operand(dy_, layer_.hidden, routing_.row_token.data() + first),
                    f32_operand(args_.lora->expert(LoraTensor::kBDown, expert), rank, RightLayout::kKN), out, rank,
                    engine_.scratch_of(worker));
  });
}

void Engine::BackwardPass::d_h() {
  const int width = layer_.intermediate, rank = lora_.rank_down;
  for_each_expert_block(pool_, routing_, width, args_.token, [&](int expert, Columns columns, int worker) {
    const GemmScratch scratch = engine_.scratch_of(worker);
    const std::int64_t first = routing_.begin_of(expert);
    const int rows = routing_.rows_of(expert);
    float* out = d_h_ + first * width + columns.first;
    for (int row = 0; row < rows; ++row) std::fill_n(out + static_cast<std::int64_t>(row) * width, columns.count, 0.0f);
    gemm_accumulate(kernels_, rows, columns.count, layer_.hidden,
                    left_operand(dy_, layer_.hidden, routing_.row_token.data() + first),
                    bf16_operand(weights_.matrix(Projection::kDown, expert) + columns.first, width, RightLayout::kKN),
                    out, width, scratch);
    if (rank == 0) return;
    gemm_accumulate(
        kernels_, rows, columns.count, rank, left_operand(dy_b_down_ + first * rank, rank, nullptr, lora_.scale_down),
        f32_operand(args_.lora->expert(LoraTensor::kADown, expert) + columns.first, width, RightLayout::kKN), out,
        width, scratch);
  });
}

void Engine::BackwardPass::route_gradients() {
  const int width = layer_.intermediate, rank = lora_.rank_down;
  for_each_expert(pool_, routing_, args_.token, [&](int expert, int) {
    const float* bias = weights_.bias(Projection::kDown, expert);
    for (std::int64_t row = routing_.begin_of(expert); row < routing_.begin_of(expert) + routing_.rows_of(expert);
         ++row) {
      const std::int64_t at = row * width;
      const std::int64_t token = routing_.row_token[static_cast<std::size_t>(row)];
      const float weight = routing_.row_weight[static_cast<std::size_t>(row)];
      row_d_weight_[row] = kernels_.dot(h_ + at, d_h_ + at, width);
      if (bias != nullptr) row_d_weight_[row] += kernels_.dot(bias, dy_ + token * layer_.hidden, layer_.hidden);
      kernels_.scale(weight, d_h_ + at, width);
      kernels_.activate_backward(layer_.activation, ticket_.gate_.data() + at, ticket_.up_.data() + at, d_h_ + at,
                                 d_gate_ + at, d_up_ + at, width);
      if (rank == 0) continue;
      // From here on the LoRA intermediates of down carry the routing weight too.
      std::copy_n(ticket_.h_a_down_.data() + row * rank, rank, weighted_h_a_ + row * rank);
      kernels_.scale(weight, weighted_h_a_ + row * rank, rank);
      kernels_.scale(weight, dy_b_down_ + row * rank, rank);
    }
  });
}

void Engine::BackwardPass::project_gate_up() {
  const int depth = layer_.intermediate;
  if (lora_.rank_gate == 0 && lora_.rank_up == 0) return;
  for_each_expert(pool_, routing_, args_.token, [&](int expert, int worker) {
    const auto project = [&](LoraTensor b, int rank, const float* source, float* target) {
      if (rank == 0) return;
      const std::int64_t first = routing_.begin_of(expert);
      const int rows = routing_.rows_of(expert);
      float* out = target + first * rank;
      std::fill_n(out, static_cast<std::int64_t>(rows) * rank, 0.0f);
      gemm_accumulate(kernels_, rows, rank, depth, left_operand(source + first * depth, depth),
                      f32_operand(args_.lora->expert(b, expert), rank, RightLayout::kKN), out, rank,
                      engine_.scratch_of(worker));
    };
    project(LoraTensor::kBGate, lora_.rank_gate, d_gate_, d_gate_b_);
    project(LoraTensor::kBUp, lora_.rank_up, d_up_, d_up_b_);
  });
}

void Engine::BackwardPass::d_x() {
  const int width = layer_.hidden, depth = layer_.intermediate;
  for_each_expert_block(pool_, routing_, width, args_.token, [&](int expert, Columns columns, int worker) {
    const GemmScratch scratch = engine_.scratch_of(worker);
    const std::int64_t first = routing_.begin_of(expert);
    const int rows = routing_.rows_of(expert);
    float* out = d_x_rows_ + first * width + columns.first;
    for (int row = 0; row < rows; ++row) std::fill_n(out + static_cast<std::int64_t>(row) * width, columns.count, 0.0f);
    const auto project = [&](Projection projection, const float* source, LoraTensor a, int rank, float scale,
                             const float* source_b) {
      gemm_accumulate(kernels_, rows, columns.count, depth, left_operand(source + first * depth, depth),
                      bf16_operand(weights_.matrix(projection, expert) + columns.first, width, RightLayout::kKN), out,
                      width, scratch);
      if (rank == 0) return;
      gemm_accumulate(kernels_, rows, columns.count, rank, left_operand(source_b + first * rank, rank, nullptr, scale),
                      f32_operand(args_.lora->expert(a, expert) + columns.first, width, RightLayout::kKN), out, width,
                      scratch);
    };
    project(Projection::kGate, d_gate_, LoraTensor::kAGate, lora_.rank_gate, lora_.scale_gate, d_gate_b_);
    const LoraTensor a_up = lora_.tied ? LoraTensor::kAGate : LoraTensor::kAUp;
    project(Projection::kUp, d_up_, a_up, lora_.rank_up, lora_.scale_up, d_up_b_);
  });
}

void Engine::BackwardPass::write_d_weights() {
  for (std::size_t slot = 0; slot < routing_.slot_row.size(); ++slot) {
    const std::int32_t row = routing_.slot_row[slot];
    args_.d_weights[slot] = row == Routing::kDropped ? 0.0f : row_d_weight_[row];
  }
}

void Engine::BackwardPass::outer(int expert, LoraTensor tensor, float scale, LeftOperand left, RightOperand right,
                                 const GemmScratch& scratch) {
  const LoraShape shape = lora_shape(layer_, lora_, tensor);
  left.transposed = true;
  left.scale = scale;
  gemm_accumulate(kernels_, static_cast<int>(shape.rows), static_cast<int>(shape.columns), routing_.rows_of(expert),
                  left, right, args_.gradients->expert(tensor, expert), shape.columns, scratch);
}

void Engine::BackwardPass::accumulate_gate_up(int expert, const GemmScratch& scratch) {
  const std::int64_t first = routing_.begin_of(expert);
  const std::int32_t* tokens = routing_.row_token.data() + first;
  const std::int64_t hidden = layer_.hidden, inter = layer_.intermediate;
  const RightOperand x = f32_operand(x_, hidden, RightLayout::kKN, tokens);
  const int r_gate = lora_.rank_gate, r_up = lora_.rank_up;
  const float* x_a_up = lora_.tied ? ticket_.x_a_gate_.data() : ticket_.x_a_up_.data();
  if (r_gate > 0) {
    outer(expert, LoraTensor::kBGate, lora_.scale_gate, left_operand(d_gate_ + first * inter, inter),
          f32_operand(ticket_.x_a_gate_.data() + first * r_gate, r_gate, RightLayout::kKN), scratch);
    outer(expert, LoraTensor::kAGate, lora_.scale_gate, left_operand(d_gate_b_ + first * r_gate, r_gate), x, scratch);
  }
  if (r_up > 0) {
    outer(expert, LoraTensor::kBUp, lora_.scale_up, left_operand(d_up_ + first * inter, inter),
          f32_operand(x_a_up + first * r_up, r_up, RightLayout::kKN), scratch);
    outer(expert, args_.lora->a_up(), lora_.scale_up, left_operand(d_up_b_ + first * r_up, r_up), x, scratch);
  }
}

void Engine::BackwardPass::accumulate_down(int expert, const GemmScratch& scratch) {
  const int rank = lora_.rank_down;
  if (rank == 0) return;
  const std::int64_t first = routing_.begin_of(expert);
  const std::int64_t inter = layer_.intermediate;
  outer(expert, LoraTensor::kBDown, lora_.scale_down,
        left_operand(dy_, layer_.hidden, routing_.row_token.data() + first),
        f32_operand(weighted_h_a_ + first * rank, rank, RightLayout::kKN), scratch);
  outer(expert, LoraTensor::kADown, lora_.scale_down, left_operand(dy_b_down_ + first * rank, rank),
        f32_operand(h_ + first * inter, inter, RightLayout::kKN), scratch);
}

void Engine::BackwardPass::accumulate_lora_gradients() {
  if (!lora_.any()) return;
  // One owner per (expert, half), rows in token order: no atomics, and the same bits for any number of workers.
  pool_.run(2 * static_cast<std::int64_t>(routing_.active.size()), [&](std::int64_t task, int worker) {
    const int expert = routing_.active[static_cast<std::size_t>(task / 2)];
    const GemmScratch scratch = engine_.scratch_of(worker);
    if (task % 2 == 0) {
      accumulate_gate_up(expert, scratch);
    } else {
      accumulate_down(expert, scratch);
    }
  });
}

}  // namespace kt_expert
