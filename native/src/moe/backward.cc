// Gradients of x and of the routing weights from a ticket and dy. The routing weight enters after the products, so
// nothing is rounded for its sake: with p = W_down^T dy (+ LoRA), d_w = <h, p> (+ <bias_down, dy>) and d_h = w * p.
#include "moe/backward.h"

#include <algorithm>
#include <utility>

namespace kt_expert {
namespace {

// Columns of one partial sum of <h, p>: the partials do not depend on how columns are cut into tasks.
constexpr int kDotColumns = kLeastColumns;

std::vector<Batch> batches_of(Span<const BackwardArgs> args) {
  std::vector<Batch> batches;
  for (const BackwardArgs& each : args) {
    batches.push_back({each.lora, each.ticket->lora(), &each.ticket->routing(), each.ticket->dropout()});
  }
  return batches;
}

}  // namespace

Engine::BackwardPass::Buffers Engine::BackwardPass::take(Carver& carver, const KernelTable& kernels,
                                                         const LayerSpec& layer, const std::vector<BatchSize>& batches,
                                                         int nodes, SavePolicy policy, FloatType output,
                                                         bool trains_weights) {
  Buffers buffers;
  const BatchSize all = sum_of(batches);
  buffers.dy = TokenOperands::take(carver, kernels, all.tokens, all.routes, layer.hidden);
  if (has_gate(layer.activation.kind)) {
    buffers.d_gate = OperandRows::take(carver, kernels, all.routes, layer.intermediate);
  }
  buffers.d_up = OperandRows::take(carver, kernels, all.routes, layer.intermediate);
  for (const BatchSize& batch : batches) {
    buffers.own.push_back(take_own(carver, kernels, layer, batch, policy, trains_weights));
  }
  buffers.dx = TokenSums::take(carver, all.tokens, layer.hidden, nodes, output);
  return buffers;
}

Engine::BackwardPass::OwnBuffers Engine::BackwardPass::take_own(Carver& carver, const KernelTable& kernels,
                                                                const LayerSpec& layer, const BatchSize& batch,
                                                                SavePolicy policy, bool trains_weights) {
  OwnBuffers own;
  const AdapterSpec& lora = batch.lora;
  const std::int64_t tokens = batch.tokens * layer.hidden, hidden = batch.routes * layer.intermediate;
  const bool fp32_operands = kernels.operand == OperandType::kF32, gated = has_gate(layer.activation.kind);
  if (policy == SavePolicy::kInputs) {
    if (gated) own.recomputed.gate = carver.take<float>(hidden);
    own.recomputed.up = carver.take<float>(hidden);
  }
  if (gated && !fp32_operands) own.d_gate_f32 = carver.take<float>(hidden);
  if (!fp32_operands) own.d_up_f32 = carver.take<float>(hidden);
  if (batch.reads_x()) own.x_f32 = carver.take<float>(tokens);
  if (!fp32_operands && (lora.rank_down > 0 || trains_weights)) own.dy_f32 = carver.take<float>(tokens);
  if (trains_weights) {
    own.whole_x_f32 = carver.take<float>(tokens);
    own.weighted_h = carver.take<float>(hidden);
  }
  if (lora.rank_down > 0) {
    own.h_f32 = carver.take<float>(hidden);
    own.dy_b_down = LoraRows::take(carver, kernels, batch.routes, lora.rank_down, nullptr);
    own.weighted_h_a = carver.take<float>(batch.routes * rank_stride(lora.rank_down));
  }
  own.d_gate_b = LoraRows::take(carver, kernels, batch.routes, lora.rank_gate, nullptr);
  own.d_up_b = LoraRows::take(carver, kernels, batch.routes, lora.tied ? 0 : lora.rank_up, nullptr);
  own.d_weight_parts = carver.take<float>(batch.routes * ceil_div(layer.intermediate, kDotColumns));
  own.d_weight_rows = carver.take<float>(batch.routes);
  return own;
}

std::int64_t Engine::BackwardPass::scratch_bytes(const KernelTable& kernels, const LayerSpec& layer,
                                                 const std::vector<BatchSize>& batches, int nodes, int workers,
                                                 bool trains_weights) {
  // The larger of both ticket policies: a run may use either.
  Carver carver(nullptr);
  take(carver, kernels, layer, batches, nodes, SavePolicy::kInputs, FloatType::kBf16, trains_weights);
  HiddenPass::reserve(carver, kernels, layer, batches, workers);
  return carver.used();
}

void Engine::BackwardPass::run(Engine& engine, Span<const BackwardArgs> args) {
  const Ticket& first = *args[0].ticket;
  const LayerSpec& layer = first.layer();
  const int nodes = static_cast<int>(args[0].weights->slices().size());
  const bool trains_weights =
      std::any_of(args.begin(), args.end(), [](const BackwardArgs& each) { return each.weight_gradients != nullptr; });
  const KernelTable& kernels = engine.kernels_for_tokens(first.type());
  std::vector<Batch> batches = batches_of(args);
  const std::vector<BatchSize> sizes = sizes_of(batches);
  const Arena::Lease lease(*engine.arena_,
                           scratch_bytes(kernels, layer, sizes, nodes, engine.threads(), trains_weights));
  Carver carver(lease.data());
  Buffers buffers = take(carver, kernels, layer, sizes, nodes, first.policy(), args[0].dx.type, trains_weights);
  for (std::size_t b = 0; b < args.size(); ++b) buffers.own[b].saved = args[b].ticket->store();
  StageClock clock(engine.threads());
  if (first.policy() == SavePolicy::kInputs) {
    std::vector<HiddenStore> stores;
    std::vector<TokensIn> x;
    for (std::size_t b = 0; b < args.size(); ++b) {
      stores.push_back(buffers.own[b].recomputed);
      x.push_back(args[b].ticket->x());
    }
    HiddenPass hidden(engine, first.type(), *args[0].weights, batches, args[0].token, clock, carver, std::move(stores));
    hidden.run(x);
    for (std::size_t b = 0; b < args.size(); ++b) buffers.own[b].saved = hidden.kept(b);
  }
  BackwardPass(engine, args, std::move(batches), clock, std::move(buffers)).run_phases();
  engine.last_stages_ = clock.total();
}

Engine::BackwardPass::BackwardPass(Engine& engine, Span<const BackwardArgs> args, std::vector<Batch> batches,
                                   StageClock& clock, Buffers buffers)
    : Pass(engine, args[0].ticket->type(), *args[0].weights, std::move(batches), args[0].token, clock),
      args_(args),
      buffers_(std::move(buffers)),
      parts_per_row_(ceil_div(layer_.intermediate, kDotColumns)) {}

void Engine::BackwardPass::run_phases() {
  clock_.run(Stage::kGather, [&] { load(); });
  clock_.run(Stage::kLora, [&] { project_dy(); });
  clock_.run_mixed([&] { for_each_hidden_block([&](const BlockTask& at) { hidden_block(at); }); });
  clock_.run(Stage::kScatter, [&] { finish_route_gradients(); });
  clock_.run(Stage::kLora, [&] { project_hidden(); });
  clock_.run_mixed([&] { input_gradients(); });
  const std::vector<BatchExpert> matrices = with_lora_gradients();
  if (token_ != nullptr) token_->check();
  // Nothing below can fail or be cancelled.
  clock_.run(Stage::kGradients, [&] {
    for (std::size_t b = 0; b < batches_.size(); ++b) {
      write_d_weights(b);
      clear_gradients(b);
    }
    lora_gradients(matrices);
    for (std::size_t b = 0; b < batches_.size(); ++b) weight_gradients(b);
  });
}

void Engine::BackwardPass::load() {
  std::vector<TokensIn> dy;
  for (const BackwardArgs& each : args_) dy.push_back(each.dy);
  load_operands(dy, buffers_.dy);
  for (std::size_t b = 0; b < batches_.size(); ++b) load_batch(b);
}

// What its gradients are made of.
void Engine::BackwardPass::load_batch(std::size_t index) {
  const Batch& batch = batches_[index];
  const BackwardArgs& args = args_[index];
  OwnBuffers& own = buffers_.own[index];
  if (batch.reads_x() && batch.drops()) {
    load_dropped_x(index, args.ticket->x(), own.x_f32);
    own.x = {own.x_f32, layer_.hidden, nullptr};
  } else if (batch.reads_x()) {
    own.x = {load_f32(index, args.ticket->x(), own.x_f32), layer_.hidden, nullptr};
  }
  if (trains_weights(index)) {
    own.whole_x = {load_f32(index, args.ticket->x(), own.whole_x_f32), layer_.hidden, nullptr};
  }
  if (batch.lora.rank_down == 0 && !trains_weights(index)) return;
  const OperandRows& dy = buffers_.dy.tokens;
  if (kernels_.operand == OperandType::kF32) {
    own.dy = {dy.f32() + plan_.first_token(index) * dy.stride, dy.stride, nullptr};
  } else {
    own.dy = {load_f32(index, args.dy, own.dy_f32), layer_.hidden, nullptr};
  }
}

void Engine::BackwardPass::project_dy() {
  for_each_batch_rows([&](const BatchRows& rows, int worker) {
    const Batch& batch = batches_[rows.batch];
    const int rank = batch.lora.rank_down;
    if (rank == 0) return;
    const F32Matrix b{batch.adapter->expert(AdapterTensor::kBDown, rows.expert), rank, RightLayout::kKN};
    const LoraInput input{kernels_, buffers_.dy.of(rows.shared, plan_.row_token()), b, layer_.hidden};
    project_lora(rows, &input, 1, batch.lora.scale_down, buffers_.own[rows.batch].dy_b_down, worker);
  });
}

void Engine::BackwardPass::hidden_block(const BlockTask& at) {
  const RowTask& task = at.rows;
  const WorkerScratch scratch = scratch_of(at.worker);
  float* d_h = scratch.blocks[0];
  float* h = scratch.blocks[1];
  const int first = at.intermediate_column(), padded = at.depth_blocks() * kBlockDepth;
  clock_.start(at.worker);
  clear_block(d_h, task.count, padded);
  multiply_backward(kernels_, buffers_.dy.of(task.first, plan_.row_token()), task.count,
                    at.slice.matrix(Projection::kDown, task.expert), at.first_column / kBlockDepth, at.depth_blocks(),
                    d_h, block_stride_, scratch.panels);
  clock_.lap(at.worker, Stage::kDown);
  for (const BatchRows& rows : task.batches) {
    const Batch& batch = batches_[rows.batch];
    const LoraRows& dy_b = buffers_.own[rows.batch].dy_b_down;
    if (batch.lora.rank_down == 0) continue;
    const float* a = batch.adapter->expert(AdapterTensor::kADown, task.expert) + first;
    const F32Matrix matrix{a, layer_.intermediate, RightLayout::kKN};
    if (batch.drops()) {
      add_dropped_lora(at, rows, dy_b, matrix, first, d_h,
                       [&](std::int64_t row) { return h_dropout(batch, task.expert, row); });
    } else {
      add_lora(at, rows, dy_b, matrix, d_h);
    }
  }
  clock_.lap(at.worker, Stage::kLora);
  for (const BatchRows& rows : task.batches) {
    for (int m = 0; m < rows.count; ++m) {
      const std::int64_t in_block = std::int64_t{rows.shared - task.first + m} * block_stride_;
      finish_hidden_row(rows, m, first, at.columns, padded, d_h + in_block, h + in_block);
    }
  }
  clock_.lap(at.worker, Stage::kActivation);
}

void Engine::BackwardPass::finish_hidden_row(const BatchRows& rows, int m, int first_column, int columns,
                                             std::int64_t padded, float* d_h, float* h) {
  const Batch& batch = batches_[rows.batch];
  const OwnBuffers& own = buffers_.own[rows.batch];
  const std::int64_t row = std::int64_t{rows.first} + m, shared = std::int64_t{rows.shared} + m;
  const std::int64_t at = row * layer_.intermediate + first_column;
  const float weight = batch.routing->row_weight[static_cast<std::size_t>(row)];
  const bool gated = has_gate(layer_.activation.kind);
  const float* gate = gated ? own.saved.gate + at : nullptr;
  kernels_.activate(layer_.activation, gate, own.saved.up + at, h, columns);
  float* parts = own.d_weight_parts + row * parts_per_row_ + first_column / kDotColumns;
  for (int c = 0; c < columns; c += kDotColumns) {
    parts[c / kDotColumns] = kernels_.dot(h + c, d_h + c, std::min(kDotColumns, columns - c));
  }
  if (own.h_f32 != nullptr) {
    std::copy_n(h, columns, own.h_f32 + at);
    if (batch.drops()) drop_row(h_dropout(batch, rows.expert, row), first_column, own.h_f32 + at, columns);
  }
  if (own.weighted_h != nullptr) {
    std::copy_n(h, columns, own.weighted_h + at);
    kernels_.scale(weight, own.weighted_h + at, columns);
  }
  kernels_.scale(weight, d_h, columns);
  float* d_gate = h;  // h is not needed any more
  kernels_.activate_backward(layer_.activation, gate, own.saved.up + at, d_h, d_gate, d_h, columns);
  const std::int64_t offset = static_cast<std::int64_t>(first_column) * operand_bytes(kernels_.operand);
  if (gated) store_operands(kernels_, d_gate, columns, padded, buffers_.d_gate.row(shared) + offset);
  store_operands(kernels_, d_h, columns, padded, buffers_.d_up.row(shared) + offset);
  if (own.d_gate_f32 != nullptr) std::copy_n(d_gate, columns, own.d_gate_f32 + at);
  if (own.d_up_f32 != nullptr) std::copy_n(d_h, columns, own.d_up_f32 + at);
}

// Sums the partials, and gives the LoRA intermediates of down the routing weight too.
void Engine::BackwardPass::finish_route_gradients() {
  for_each_batch_rows([&](const BatchRows& rows, int) {
    const Batch& batch = batches_[rows.batch];
    const OwnBuffers& own = buffers_.own[rows.batch];
    const int rank = batch.lora.rank_down;
    const std::int64_t stride = rank_stride(rank);
    const float* bias = weights_.bias(Projection::kDown, rows.expert);
    for (std::int64_t row = rows.first; row < rows.first + rows.count; ++row) {
      const std::int64_t token = batch.routing->row_token[static_cast<std::size_t>(row)];
      const float weight = batch.routing->row_weight[static_cast<std::size_t>(row)];
      float sum = 0.0f;
      for (std::int64_t p = 0; p < parts_per_row_; ++p) sum += own.d_weight_parts[row * parts_per_row_ + p];
      if (bias != nullptr) sum += dot_with_dy(args_[rows.batch].dy, bias, token);
      own.d_weight_rows[row] = sum;
      if (rank == 0) continue;
      std::copy_n(own.saved.h_a_down + row * stride, rank, own.weighted_h_a + row * stride);
      kernels_.scale(weight, own.weighted_h_a + row * stride, rank);
      kernels_.scale(weight, own.dy_b_down.f32 + row * stride, rank);
    }
  });
}

float Engine::BackwardPass::dot_with_dy(TokensIn dy, const float* bias, std::int64_t token) const {
  const std::int64_t width = layer_.hidden;
  if (dy.type == FloatType::kF32) {
    return kernels_.dot(bias, static_cast<const float*>(dy.data) + token * width, width);
  }
  const bf16_t* row = static_cast<const bf16_t*>(dy.data) + token * width;
  float sum = 0.0f;
  float piece[kDotColumns];
  for (std::int64_t c = 0; c < width; c += kDotColumns) {
    const std::int64_t count = std::min<std::int64_t>(kDotColumns, width - c);
    kernels_.bf16_to_f32(row + c, piece, count);
    sum += kernels_.dot(bias + c, piece, count);
  }
  return sum;
}

void Engine::BackwardPass::project_hidden() {
  for_each_batch_rows([&](const BatchRows& rows, int worker) {
    if (batches_[rows.batch].reads_x()) project_hidden_rows(rows, worker);
  });
}

// In fp32 on every ISA: these few products make the gradients of A, where a rounded d_gate would show.
void Engine::BackwardPass::project_hidden_rows(const BatchRows& rows, int worker) {
  const Batch& batch = batches_[rows.batch];
  const AdapterSpec& lora = batch.lora;
  const OwnBuffers& own = buffers_.own[rows.batch];
  const auto input = [&](AdapterTensor b, int rank, const OperandRows& operands, const float* f32) {
    const OuterRows from = d_hidden_rows(operands, f32, rows.first, rows.shared);
    return LoraInput{engine_.fp32_kernels_,
                     {from.base, from.stride, nullptr},
                     {batch.adapter->expert(b, rows.expert), rank, RightLayout::kKN},
                     layer_.intermediate};
  };
  const auto gate = [&] { return input(AdapterTensor::kBGate, lora.rank_gate, buffers_.d_gate, own.d_gate_f32); };
  const auto up = [&] { return input(AdapterTensor::kBUp, lora.rank_up, buffers_.d_up, own.d_up_f32); };
  if (lora.tied) {
    const LoraInput both[] = {gate(), up()};
    project_lora(rows, both, 2, lora.scale_gate, own.d_gate_b, worker);
    return;
  }
  if (lora.rank_gate > 0) {
    const LoraInput one = gate();
    project_lora(rows, &one, 1, lora.scale_gate, own.d_gate_b, worker);
  }
  if (lora.rank_up > 0) {
    const LoraInput one = up();
    project_lora(rows, &one, 1, lora.scale_up, own.d_up_b, worker);
  }
}

void Engine::BackwardPass::input_gradients() {
  std::vector<TokensOut> dx;
  for (const BackwardArgs& each : args_) dx.push_back(each.dx);
  sum_over_routes(
      buffers_.dx, dx, [&](const BlockTask& at, float* block) { input_block(at, block); },
      [](const BatchRows&, std::size_t) { return 1.0f; });
}

void Engine::BackwardPass::input_block(const BlockTask& at, float* block) const {
  const RowTask& task = at.rows;
  const auto base = [&](Projection projection, const OperandRows& rows) {
    multiply_backward(kernels_, rows.from_column(task.first, at.slice.first), task.count,
                      at.slice.matrix(projection, task.expert), at.first_column / kBlockDepth, at.depth_blocks(), block,
                      block_stride_, scratch_of(at.worker).panels);
  };
  if (has_gate(layer_.activation.kind)) base(Projection::kGate, buffers_.d_gate);
  base(Projection::kUp, buffers_.d_up);
  clock_.lap(at.worker, Stage::kGateUp);
  if (!is_first(at.slice)) return;
  for (const BatchRows& rows : task.batches) {
    const Batch& batch = batches_[rows.batch];
    const auto lora = [&](AdapterTensor a, const LoraRows& left) {
      if (left.rank == 0) return;
      const F32Matrix matrix{batch.adapter->expert(a, task.expert) + at.first_column, layer_.hidden, RightLayout::kKN};
      if (batch.drops()) {
        add_dropped_lora(at, rows, left, matrix, at.first_column, block, [&](std::int64_t row) {
          return x_dropout(batch, batch.routing->row_token[static_cast<std::size_t>(row)]);
        });
      } else {
        add_lora(at, rows, left, matrix, block);
      }
    };
    lora(AdapterTensor::kAGate, buffers_.own[rows.batch].d_gate_b);
    lora(AdapterTensor::kAUp, buffers_.own[rows.batch].d_up_b);
  }
  clock_.lap(at.worker, Stage::kLora);
}

void Engine::BackwardPass::write_d_weights(std::size_t batch) const {
  const Routing& routing = *batches_[batch].routing;
  for (std::size_t slot = 0; slot < routing.slot_row.size(); ++slot) {
    const std::int32_t row = routing.slot_row[slot];
    args_[batch].d_weights[slot] = row == Routing::kDropped ? 0.0f : buffers_.own[batch].d_weight_rows[row];
  }
}

}  // namespace kt_expert
