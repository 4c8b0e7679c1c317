#include "moe/hidden.h"

namespace kt_expert {

Engine::HiddenPass::HiddenPass(Engine& engine, FloatType type, const LayerWeights& weights,
                               const AdapterTensors* adapter, const AdapterSpec& lora, const Routing& routing,
                               const CancelToken* token, DropoutSeed dropout, Carver& carver, const HiddenStore& store)
    : Pass(engine, type, weights, adapter, lora, routing, token, dropout), store_(store) {
  buffers_ = take(carver, kernels_, layer_, lora_, routing.tokens, routing.routes, pool_.size(), store);
}

Engine::HiddenPass::Buffers Engine::HiddenPass::take(Carver& carver, const KernelTable& kernels, const LayerSpec& layer,
                                                     const AdapterSpec& lora, std::int64_t tokens, std::int64_t routes,
                                                     int workers, const HiddenStore& store) {
  Buffers buffers;
  buffers.x = TokenOperands::take(carver, kernels, tokens, routes, layer.hidden);
  buffers.h = OperandRows::take(carver, kernels, routes, layer.intermediate);
  if (lora.dropout > 0.0f && reads_x(lora)) {
    buffers.dropped_x = TokenOperands::take(carver, kernels, tokens, routes, layer.hidden);
  }
  if (lora.dropout > 0.0f && lora.rank_down > 0) {
    buffers.dropped_h = OperandRows::take(carver, kernels, routes, layer.intermediate);
  }
  buffers.x_a_gate = LoraRows::take(carver, kernels, routes, lora.rank_gate, store.x_a_gate);
  buffers.x_a_up = lora.tied ? buffers.x_a_gate : LoraRows::take(carver, kernels, routes, lora.rank_up, store.x_a_up);
  buffers.h_a_down = LoraRows::take(carver, kernels, routes, lora.rank_down, store.h_a_down);
  if (kernels.integer != nullptr) {
    buffers.x_codes = IntegerBuffer::take(carver, routes, layer.hidden);
    buffers.h_codes = IntegerBuffer::take(carver, routes, layer.intermediate);
    buffers.plain_rows = carver.take<float>(std::int64_t{workers} * std::max(layer.hidden, layer.intermediate));
  }
  return buffers;
}

void Engine::HiddenPass::reserve(Carver& carver, const KernelTable& kernels, const LayerSpec& layer,
                                 const AdapterSpec& lora, std::int64_t tokens, std::int64_t routes, int workers) {
  take(carver, kernels, layer, lora, tokens, routes, workers, HiddenStore{});
}

void Engine::HiddenPass::run(TokensIn x) {
  load_operands(x, buffers_.x);
  if (in_integers()) quantise(buffers_.x.tokens, routing_.row_token.data(), layer_.hidden, buffers_.x_codes);
  if (drops() && reads_x(lora_)) load_dropped_x(x, buffers_.dropped_x);
  project_x();
  for_each_hidden_block([&](const BlockTask& at) { gate_up_block(at); });
  if (in_integers()) quantise(buffers_.h, nullptr, layer_.intermediate, buffers_.h_codes);
  project_h();
}

void Engine::HiddenPass::quantise(const OperandRows& source, const std::int32_t* row_of, std::int64_t width,
                                  const IntegerBuffer& target) {
  const std::int64_t padded = align_up(width, kIntegerDepthAlign),
                     widest = std::max(layer_.hidden, layer_.intermediate);
  for_each_piece(routing_.routes, [&](std::int64_t first, std::int64_t last, int worker) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::uint8_t* from = source.row(row_of == nullptr ? row : row_of[row]);
      const float* values = reinterpret_cast<const float*>(from);
      if (kernels_.operand == OperandType::kBf16) {
        float* plain = buffers_.plain_rows + worker * widest;
        kernels_.bf16_to_f32(reinterpret_cast<const bf16_t*>(from), plain, width);
        values = plain;
      }
      std::int8_t* codes = target.codes + row * target.stride;
      target.scales[row] = kernels_.integer->quantise(values, width, codes);
      std::fill(codes + width, codes + padded, std::int8_t{0});
    }
  });
}

void Engine::HiddenPass::project_x() {
  if (!reads_x(lora_)) return;
  const TokenOperands& x = drops() ? buffers_.dropped_x : buffers_.x;
  for_each_row_task([&](const RowTask& task, int worker) {
    const auto project = [&](AdapterTensor a, float scale, const LoraRows& target) {
      if (target.rank == 0) return;
      const F32Matrix matrix{adapter_->expert(a, task.expert), layer_.hidden, RightLayout::kNK};
      const LoraInput input{kernels_, x.of(task, routing_), matrix, layer_.hidden};
      project_lora(task, &input, 1, scale * kept_scale(), target, worker);
    };
    project(AdapterTensor::kAGate, lora_.scale_gate, buffers_.x_a_gate);
    if (!lora_.tied) project(AdapterTensor::kAUp, lora_.scale_up, buffers_.x_a_up);
  });
}

void Engine::HiddenPass::multiply_base(const BlockTask& at, Projection projection, const LeftRows& rows,
                                       const IntegerRows& codes, float* block) const {
  const PackedMatrix matrix = at.slice.matrix(projection, at.rows.expert);
  const int first_block = at.first_column / kBlockRows;
  if (in_integers()) {
    kernels_.integer->multiply(codes, at.rows.count, matrix, first_block, at.row_blocks(), block, block_stride_);
  } else {
    multiply_forward(kernels_, rows, at.rows.count, matrix, first_block, at.row_blocks(), block, block_stride_,
                     scratch_of(at.worker).panels);
  }
}

void Engine::HiddenPass::multiply_hidden(const BlockTask& at, float* block) const {
  multiply_base(at, Projection::kDown, buffers_.h.from_column(at.rows.first, at.slice.first),
                in_integers() ? buffers_.h_codes.from(at.rows.first, at.slice.first) : IntegerRows{}, block);
}

// block = x W^T (+ bias, + LoRA) for a block of columns; columns past the slice's come out zero.
void Engine::HiddenPass::project_block(const BlockTask& at, Projection projection, float* block) const {
  const RowTask& task = at.rows;
  clear_block(block, task.count, at.depth_blocks() * kBlockDepth);
  if (const float* bias = weights_.bias(projection, task.expert); bias != nullptr) {
    for (int m = 0; m < task.count; ++m) {
      std::copy_n(bias + at.intermediate_column(), at.columns, block_row(block, m));
    }
  }
  multiply_base(at, projection, buffers_.x.of(task, routing_),
                in_integers() ? buffers_.x_codes.from(task.first, 0) : IntegerRows{}, block);
  const bool is_gate = projection == Projection::kGate;
  const LoraRows& x_a = is_gate ? buffers_.x_a_gate : buffers_.x_a_up;
  if (x_a.rank == 0) return;
  const float* b = adapter_->expert(is_gate ? AdapterTensor::kBGate : AdapterTensor::kBUp, task.expert);
  b += static_cast<std::int64_t>(at.intermediate_column()) * x_a.rank;
  multiply_lora(task, x_a, {b, x_a.rank, RightLayout::kNK}, at.columns, block, at.worker);
}

void Engine::HiddenPass::gate_up_block(const BlockTask& at) {
  const WorkerScratch scratch = scratch_of(at.worker);
  float* gate = scratch.blocks[0];
  float* up = scratch.blocks[1];
  const bool gated = has_gate(layer_.activation.kind);
  if (gated) project_block(at, Projection::kGate, gate);
  project_block(at, Projection::kUp, up);
  const std::int64_t first = at.intermediate_column(), padded = align_up(at.columns, kBlockDepth);
  for (int m = 0; m < at.rows.count; ++m) {
    const std::int64_t in_block = std::int64_t{m} * block_stride_, row = std::int64_t{at.rows.first} + m;
    const std::int64_t kept = row * layer_.intermediate + first;
    if (store_.gate != nullptr && gated) std::copy_n(gate + in_block, at.columns, store_.gate + kept);
    if (store_.up != nullptr) std::copy_n(up + in_block, at.columns, store_.up + kept);
    kernels_.activate(layer_.activation, gate + in_block, up + in_block, up + in_block, at.columns);
    std::uint8_t* target = buffers_.h.row(row) + first * operand_bytes(kernels_.operand);
    store_operands(kernels_, up + in_block, at.columns, padded, target);
    if (!drops() || lora_.rank_down == 0) continue;
    drop_row(mask_of(h_dropout(at.rows.expert, row)), first, up + in_block, at.columns);
    target = buffers_.dropped_h.row(row) + first * operand_bytes(kernels_.operand);
    store_operands(kernels_, up + in_block, at.columns, padded, target);
  }
}

void Engine::HiddenPass::project_h() {
  if (lora_.rank_down == 0) return;
  for_each_row_task([&](const RowTask& task, int worker) {
    const F32Matrix matrix{adapter_->expert(AdapterTensor::kADown, task.expert), layer_.intermediate, RightLayout::kNK};
    const OperandRows& h = drops() ? buffers_.dropped_h : buffers_.h;
    const LoraInput input{kernels_, h.from(task.first), matrix, layer_.intermediate};
    project_lora(task, &input, 1, lora_.scale_down * kept_scale(), buffers_.h_a_down, worker);
  });
}

}  // namespace kt_expert
