// Gradients of x and of the routing weights from a ticket and dy. The routing weight enters after the products, so
// nothing is rounded for its sake: with p = W_down^T dy (+ LoRA), d_w = <h, p> (+ <bias_down, dy>) and d_h = w * p.
#include "moe/backward.h"

namespace kt_expert {
namespace {

// Columns of one partial sum of <h, p>: the partials do not depend on how columns are cut into tasks.
constexpr int kDotColumns = kLeastColumns;

}  // namespace

Engine::BackwardPass::Buffers Engine::BackwardPass::take(Carver& carver, const KernelTable& kernels,
                                                         const LayerSpec& layer, const AdapterSpec& lora,
                                                         std::int64_t tokens, std::int64_t routes, int nodes,
                                                         SavePolicy policy, FloatType output, bool trains_weights) {
  Buffers buffers;
  const std::int64_t hidden = routes * layer.intermediate;
  const bool fp32_operands = kernels.operand == OperandType::kF32;
  if (policy == SavePolicy::kInputs) {
    if (has_gate(layer.activation.kind)) buffers.recomputed.gate = carver.take<float>(hidden);
    buffers.recomputed.up = carver.take<float>(hidden);
  }
  buffers.dy = TokenOperands::take(carver, kernels, tokens, routes, layer.hidden);
  if (has_gate(layer.activation.kind)) {
    buffers.d_gate = OperandRows::take(carver, kernels, routes, layer.intermediate);
    if (!fp32_operands) buffers.d_gate_f32 = carver.take<float>(hidden);
  }
  buffers.d_up = OperandRows::take(carver, kernels, routes, layer.intermediate);
  if (!fp32_operands) buffers.d_up_f32 = carver.take<float>(hidden);
  if (reads_x(lora)) buffers.x_f32 = carver.take<float>(tokens * layer.hidden);
  if (!fp32_operands && (lora.rank_down > 0 || trains_weights)) {
    buffers.dy_f32 = carver.take<float>(tokens * layer.hidden);
  }
  if (trains_weights) {
    buffers.whole_x_f32 = carver.take<float>(tokens * layer.hidden);
    buffers.weighted_h = carver.take<float>(hidden);
  }
  if (lora.rank_down > 0) {
    buffers.h_f32 = carver.take<float>(hidden);
    buffers.dy_b_down = LoraRows::take(carver, kernels, routes, lora.rank_down, nullptr);
    buffers.weighted_h_a = carver.take<float>(routes * rank_stride(lora.rank_down));
  }
  buffers.d_gate_b = LoraRows::take(carver, kernels, routes, lora.rank_gate, nullptr);
  buffers.d_up_b = LoraRows::take(carver, kernels, routes, lora.tied ? 0 : lora.rank_up, nullptr);
  buffers.d_weight_parts = carver.take<float>(routes * ceil_div(layer.intermediate, kDotColumns));
  buffers.d_weight_rows = carver.take<float>(routes);
  buffers.dx = TokenSums::take(carver, tokens, layer.hidden, nodes, output);
  return buffers;
}

std::int64_t Engine::BackwardPass::scratch_bytes(const KernelTable& kernels, const LayerSpec& layer,
                                                 const AdapterSpec& lora, std::int64_t tokens, std::int64_t routes,
                                                 int nodes, int workers, bool trains_weights) {
  // The larger of both ticket policies: a run may use either.
  Carver carver(nullptr);
  take(carver, kernels, layer, lora, tokens, routes, nodes, SavePolicy::kInputs, FloatType::kBf16, trains_weights);
  HiddenPass::reserve(carver, kernels, layer, lora, tokens, routes, workers);
  return carver.used();
}

void Engine::BackwardPass::run(Engine& engine, const BackwardArgs& args) {
  const Ticket& ticket = *args.ticket;
  const Routing& routing = ticket.routing();
  const LayerSpec& layer = ticket.layer();
  const int nodes = static_cast<int>(args.weights->slices().size());
  const bool trains_weights = args.weight_gradients != nullptr;
  const KernelTable& kernels = engine.kernels_for_tokens(ticket.type());
  const Arena::Lease lease(*engine.arena_, scratch_bytes(kernels, layer, ticket.lora(), routing.tokens, routing.routes,
                                                         nodes, engine.threads(), trains_weights));
  Carver carver(lease.data());
  const Buffers buffers = take(carver, kernels, layer, ticket.lora(), routing.tokens, routing.routes, nodes,
                               ticket.policy(), args.dx.type, trains_weights);
  HiddenStore saved = ticket.store();
  if (ticket.policy() == SavePolicy::kInputs) {
    saved = buffers.recomputed;
    HiddenPass hidden(engine, ticket.type(), *args.weights, args.lora, ticket.lora(), routing, args.token,
                      ticket.dropout(), carver, saved);
    hidden.run(ticket.x());
    saved = hidden.kept();
    BackwardPass(engine, args, saved, buffers).run_phases();
    return;
  }
  BackwardPass(engine, args, saved, buffers).run_phases();
}

Engine::BackwardPass::BackwardPass(Engine& engine, const BackwardArgs& args, const HiddenStore& saved,
                                   const Buffers& buffers)
    : Pass(engine, args.ticket->type(), *args.weights, args.lora, args.ticket->lora(), args.ticket->routing(),
           args.token, args.ticket->dropout()),
      args_(args),
      saved_(saved),
      buffers_(buffers),
      parts_per_row_(ceil_div(layer_.intermediate, kDotColumns)) {}

void Engine::BackwardPass::run_phases() {
  load();
  project_dy();
  for_each_hidden_block([&](const BlockTask& at) { hidden_block(at); });
  finish_route_gradients();
  project_hidden();
  input_gradients();
  if (token_ != nullptr) token_->check();
  // Nothing below can fail or be cancelled.
  write_d_weights();
  clear_gradients();
  lora_gradients();
  weight_gradients();
}

void Engine::BackwardPass::load() {
  load_operands(args_.dy, buffers_.dy);
  if (reads_x(lora_) && drops()) {
    load_dropped_x(args_.ticket->x(), buffers_.x_f32);
    x_ = {buffers_.x_f32, layer_.hidden, nullptr};
  } else if (reads_x(lora_)) {
    x_ = {load_f32(args_.ticket->x(), buffers_.x_f32), layer_.hidden, nullptr};
  }
  if (trains_weights()) whole_x_ = {load_f32(args_.ticket->x(), buffers_.whole_x_f32), layer_.hidden, nullptr};
  if (lora_.rank_down == 0 && !trains_weights()) return;
  const OperandRows& dy = buffers_.dy.tokens;
  if (kernels_.operand == OperandType::kF32) {
    dy_ = {dy.f32(), dy.stride, nullptr};
  } else {
    dy_ = {load_f32(args_.dy, buffers_.dy_f32), layer_.hidden, nullptr};
  }
}

void Engine::BackwardPass::project_dy() {
  const int rank = lora_.rank_down;
  if (rank == 0) return;
  for_each_row_task([&](const RowTask& task, int worker) {
    const F32Matrix b{adapter_->expert(AdapterTensor::kBDown, task.expert), rank, RightLayout::kKN};
    const LoraInput input{kernels_, buffers_.dy.of(task, routing_), b, layer_.hidden};
    project_lora(task, &input, 1, lora_.scale_down, buffers_.dy_b_down, worker);
  });
}

void Engine::BackwardPass::hidden_block(const BlockTask& at) {
  const RowTask& task = at.rows;
  const WorkerScratch scratch = scratch_of(at.worker);
  float* d_h = scratch.blocks[0];
  float* h = scratch.blocks[1];
  const int first = at.intermediate_column(), padded = at.depth_blocks() * kBlockDepth;
  clear_block(d_h, task.count, padded);
  multiply_backward(kernels_, buffers_.dy.of(task, routing_), task.count,
                    at.slice.matrix(Projection::kDown, task.expert), at.first_column / kBlockDepth, at.depth_blocks(),
                    d_h, block_stride_, scratch.panels);
  if (lora_.rank_down > 0) {
    const float* a = adapter_->expert(AdapterTensor::kADown, task.expert) + first;
    const F32Matrix matrix{a, layer_.intermediate, RightLayout::kKN};
    if (drops()) {
      multiply_dropped_lora(task, buffers_.dy_b_down, matrix, first, at.columns, d_h, at.worker,
                            [&](std::int64_t row) { return h_dropout(task.expert, row); });
    } else {
      multiply_lora(task, buffers_.dy_b_down, matrix, at.columns, d_h, at.worker);
    }
  }
  for (int m = 0; m < task.count; ++m) {
    const std::int64_t in_block = std::int64_t{m} * block_stride_;
    finish_hidden_row(task.expert, task.first + m, first, at.columns, padded, d_h + in_block, h + in_block);
  }
}

void Engine::BackwardPass::finish_hidden_row(int expert, std::int64_t row, int first_column, int columns,
                                             std::int64_t padded, float* d_h, float* h) {
  const std::int64_t at = row * layer_.intermediate + first_column;
  const bool gated = has_gate(layer_.activation.kind);
  const float* gate = gated ? saved_.gate + at : nullptr;
  kernels_.activate(layer_.activation, gate, saved_.up + at, h, columns);
  float* parts = buffers_.d_weight_parts + row * parts_per_row_ + first_column / kDotColumns;
  for (int c = 0; c < columns; c += kDotColumns) {
    parts[c / kDotColumns] = kernels_.dot(h + c, d_h + c, std::min(kDotColumns, columns - c));
  }
  if (buffers_.h_f32 != nullptr) {
    std::copy_n(h, columns, buffers_.h_f32 + at);
    if (drops()) drop_row(h_dropout(expert, row), first_column, buffers_.h_f32 + at, columns);
  }
  if (buffers_.weighted_h != nullptr) {
    std::copy_n(h, columns, buffers_.weighted_h + at);
    kernels_.scale(routing_.row_weight[static_cast<std::size_t>(row)], buffers_.weighted_h + at, columns);
  }
  kernels_.scale(routing_.row_weight[static_cast<std::size_t>(row)], d_h, columns);
  float* d_gate = h;  // h is not needed any more
  kernels_.activate_backward(layer_.activation, gate, saved_.up + at, d_h, d_gate, d_h, columns);
  const std::int64_t offset = static_cast<std::int64_t>(first_column) * operand_bytes(kernels_.operand);
  if (gated) store_operands(kernels_, d_gate, columns, padded, buffers_.d_gate.row(row) + offset);
  store_operands(kernels_, d_h, columns, padded, buffers_.d_up.row(row) + offset);
  if (buffers_.d_gate_f32 != nullptr) std::copy_n(d_gate, columns, buffers_.d_gate_f32 + at);
  if (buffers_.d_up_f32 != nullptr) std::copy_n(d_h, columns, buffers_.d_up_f32 + at);
}

// Sums the partials, and gives the LoRA intermediates of down the routing weight too.
void Engine::BackwardPass::finish_route_gradients() {
  const int rank = lora_.rank_down;
  const std::int64_t stride = rank_stride(rank);
  for_each_row_task([&](const RowTask& task, int) {
    const float* bias = weights_.bias(Projection::kDown, task.expert);
    for (std::int64_t row = task.first; row < task.first + task.count; ++row) {
      const std::int64_t token = routing_.row_token[static_cast<std::size_t>(row)];
      const float weight = routing_.row_weight[static_cast<std::size_t>(row)];
      float sum = 0.0f;
      for (std::int64_t p = 0; p < parts_per_row_; ++p) sum += buffers_.d_weight_parts[row * parts_per_row_ + p];
      if (bias != nullptr) sum += dot_with_dy(bias, token);
      buffers_.d_weight_rows[row] = sum;
      if (rank == 0) continue;
      std::copy_n(saved_.h_a_down + row * stride, rank, buffers_.weighted_h_a + row * stride);
      kernels_.scale(weight, buffers_.weighted_h_a + row * stride, rank);
      kernels_.scale(weight, buffers_.dy_b_down.f32 + row * stride, rank);
    }
  });
}

float Engine::BackwardPass::dot_with_dy(const float* bias, std::int64_t token) const {
  const std::int64_t width = layer_.hidden;
  if (args_.dy.type == FloatType::kF32) {
    return kernels_.dot(bias, static_cast<const float*>(args_.dy.data) + token * width, width);
  }
  const bf16_t* row = static_cast<const bf16_t*>(args_.dy.data) + token * width;
  float sum = 0.0f;
  float piece[kDotColumns];
  for (std::int64_t c = 0; c < width; c += kDotColumns) {
    const std::int64_t count = std::min<std::int64_t>(kDotColumns, width - c);
    kernels_.bf16_to_f32(row + c, piece, count);
    sum += kernels_.dot(bias + c, piece, count);
  }
  return sum;
}

// In fp32 on every ISA: these few products make the gradients of A, where a rounded d_gate would show.
void Engine::BackwardPass::project_hidden() {
  if (lora_.rank_gate == 0 && lora_.rank_up == 0) return;
  for_each_row_task([&](const RowTask& task, int worker) {
    const auto input = [&](AdapterTensor b, int rank, const OperandRows& operands, const float* f32) {
      const OuterRows rows = d_hidden_rows(operands, f32, task.first);
      return LoraInput{engine_.fp32_kernels_,
                       {rows.base, rows.stride, nullptr},
                       {adapter_->expert(b, task.expert), rank, RightLayout::kKN},
                       layer_.intermediate};
    };
    const auto gate = [&] {
      return input(AdapterTensor::kBGate, lora_.rank_gate, buffers_.d_gate, buffers_.d_gate_f32);
    };
    const auto up = [&] { return input(AdapterTensor::kBUp, lora_.rank_up, buffers_.d_up, buffers_.d_up_f32); };
    if (lora_.tied) {
      const LoraInput both[] = {gate(), up()};
      project_lora(task, both, 2, lora_.scale_gate, buffers_.d_gate_b, worker);
      return;
    }
    if (lora_.rank_gate > 0) {
      const LoraInput one = gate();
      project_lora(task, &one, 1, lora_.scale_gate, buffers_.d_gate_b, worker);
    }
    if (lora_.rank_up > 0) {
      const LoraInput one = up();
      project_lora(task, &one, 1, lora_.scale_up, buffers_.d_up_b, worker);
    }
  });
}

void Engine::BackwardPass::input_gradients() {
  sum_over_routes(
      buffers_.dx, args_.dx, [&](const BlockTask& at, float* block) { input_block(at, block); },
      [](std::size_t) { return 1.0f; });
}

void Engine::BackwardPass::input_block(const BlockTask& at, float* block) const {
  const RowTask& task = at.rows;
  const auto base = [&](Projection projection, const OperandRows& rows) {
    multiply_backward(kernels_, rows.from_column(task.first, at.slice.first), task.count,
                      at.slice.matrix(projection, task.expert), at.first_column / kBlockDepth, at.depth_blocks(), block,
                      block_stride_, scratch_of(at.worker).panels);
  };
  const auto lora = [&](AdapterTensor a, const LoraRows& rows) {
    if (!is_first(at.slice) || rows.rank == 0) return;
    const F32Matrix matrix{adapter_->expert(a, task.expert) + at.first_column, layer_.hidden, RightLayout::kKN};
    if (drops()) {
      multiply_dropped_lora(task, rows, matrix, at.first_column, at.columns, block, at.worker, [&](std::int64_t row) {
        return x_dropout(routing_.row_token[static_cast<std::size_t>(row)]);
      });
    } else {
      multiply_lora(task, rows, matrix, at.columns, block, at.worker);
    }
  };
  if (has_gate(layer_.activation.kind)) base(Projection::kGate, buffers_.d_gate);
  base(Projection::kUp, buffers_.d_up);
  lora(AdapterTensor::kAGate, buffers_.d_gate_b);
  lora(AdapterTensor::kAUp, buffers_.d_up_b);
}

void Engine::BackwardPass::write_d_weights() const {
  for (std::size_t slot = 0; slot < routing_.slot_row.size(); ++slot) {
    const std::int32_t row = routing_.slot_row[slot];
    args_.d_weights[slot] = row == Routing::kDropped ? 0.0f : buffers_.d_weight_rows[row];
  }
}

}  // namespace kt_expert
