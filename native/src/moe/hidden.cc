#include "moe/hidden.h"

#include <utility>

namespace kt_expert {

Engine::HiddenPass::HiddenPass(Engine& engine, FloatType type, const LayerWeights& weights, std::vector<Batch> batches,
                               const CancelToken* token, StageClock& clock, Carver& carver,
                               std::vector<HiddenStore> stores)
    : Pass(engine, type, weights, std::move(batches), token, clock), stores_(std::move(stores)) {
  buffers_ = take(carver, kernels_, layer_, sizes_of(batches_), pool_.size(), stores_);
}

Engine::HiddenPass::Buffers Engine::HiddenPass::take(Carver& carver, const KernelTable& kernels, const LayerSpec& layer,
                                                     const std::vector<BatchSize>& batches, int workers,
                                                     const std::vector<HiddenStore>& stores) {
  Buffers buffers;
  const BatchSize all = sum_of(batches);
  buffers.x = TokenOperands::take(carver, kernels, all.tokens, all.routes, layer.hidden);
  buffers.h = OperandRows::take(carver, kernels, all.routes, layer.intermediate);
  for (std::size_t b = 0; b < batches.size(); ++b) {
    const BatchSize& batch = batches[b];
    const AdapterSpec& lora = batch.lora;
    OwnBuffers own;
    if (lora.dropout > 0.0f && batch.reads_x()) {
      own.dropped_x = TokenOperands::take(carver, kernels, batch.tokens, batch.routes, layer.hidden);
    }
    if (lora.dropout > 0.0f && lora.rank_down > 0) {
      own.dropped_h = OperandRows::take(carver, kernels, batch.routes, layer.intermediate);
    }
    own.x_a_gate = LoraRows::take(carver, kernels, batch.routes, lora.rank_gate, stores[b].x_a_gate);
    own.x_a_up =
        lora.tied ? own.x_a_gate : LoraRows::take(carver, kernels, batch.routes, lora.rank_up, stores[b].x_a_up);
    own.h_a_down = LoraRows::take(carver, kernels, batch.routes, lora.rank_down, stores[b].h_a_down);
    buffers.own.push_back(own);
  }
  if (kernels.integer != nullptr) {
    buffers.x_codes = IntegerBuffer::take(carver, all.routes, layer.hidden);
    buffers.h_codes = IntegerBuffer::take(carver, all.routes, layer.intermediate);
    buffers.plain_rows = carver.take<float>(std::int64_t{workers} * std::max(layer.hidden, layer.intermediate));
  }
  return buffers;
}

void Engine::HiddenPass::reserve(Carver& carver, const KernelTable& kernels, const LayerSpec& layer,
                                 const std::vector<BatchSize>& batches, int workers) {
  take(carver, kernels, layer, batches, workers, std::vector<HiddenStore>(batches.size()));
}

void Engine::HiddenPass::run(const std::vector<TokensIn>& x) {
  clock_.run(Stage::kGather, [&] {
    load_operands(x, buffers_.x);
    if (in_integers()) quantise(buffers_.x.tokens, plan_.row_token(), layer_.hidden, buffers_.x_codes);
    for (std::size_t b = 0; b < batches_.size(); ++b) {
      if (batches_[b].drops() && batches_[b].reads_x()) load_dropped_x(b, x[b], buffers_.own[b].dropped_x);
    }
  });
  clock_.run(Stage::kLora, [&] { project_x(); });
  clock_.run_mixed([&] { for_each_hidden_block([&](const BlockTask& at) { gate_up_block(at); }); });
  if (in_integers()) {
    clock_.run(Stage::kGather, [&] { quantise(buffers_.h, nullptr, layer_.intermediate, buffers_.h_codes); });
  }
  clock_.run(Stage::kLora, [&] { project_h(); });
}

void Engine::HiddenPass::quantise(const OperandRows& source, const std::int32_t* row_of, std::int64_t width,
                                  const IntegerBuffer& target) {
  const std::int64_t padded = align_up(width, kIntegerDepthAlign),
                     widest = std::max(layer_.hidden, layer_.intermediate);
  for_each_piece(plan_.routes(), [&](std::int64_t first, std::int64_t last, int worker) {
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
  if (std::none_of(batches_.begin(), batches_.end(), [](const Batch& batch) { return batch.reads_x(); })) return;
  for_each_batch_rows([&](const BatchRows& rows, int worker) {
    const Batch& batch = batches_[rows.batch];
    const OwnBuffers& own = buffers_.own[rows.batch];
    if (!batch.reads_x()) return;
    const LeftRows x = batch.drops() ? own.dropped_x.of(rows.first, batch.routing->row_token.data())
                                     : buffers_.x.of(rows.shared, plan_.row_token());
    const auto project = [&](AdapterTensor a, float scale, const LoraRows& target) {
      if (target.rank == 0) return;
      const F32Matrix matrix{batch.adapter->expert(a, rows.expert), layer_.hidden, RightLayout::kNK};
      const LoraInput input{kernels_, x, matrix, layer_.hidden};
      project_lora(rows, &input, 1, scale * batch.kept_scale(), target, worker);
    };
    project(AdapterTensor::kAGate, batch.lora.scale_gate, own.x_a_gate);
    if (!batch.lora.tied) project(AdapterTensor::kAUp, batch.lora.scale_up, own.x_a_up);
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
  multiply_base(at, projection, buffers_.x.of(task.first, plan_.row_token()),
                in_integers() ? buffers_.x_codes.from(task.first, 0) : IntegerRows{}, block);
  clock_.lap(at.worker, Stage::kGateUp);
  const bool is_gate = projection == Projection::kGate;
  for (const BatchRows& rows : task.batches) {
    const OwnBuffers& own = buffers_.own[rows.batch];
    const LoraRows& x_a = is_gate ? own.x_a_gate : own.x_a_up;
    if (x_a.rank == 0) continue;
    const float* b =
        batches_[rows.batch].adapter->expert(is_gate ? AdapterTensor::kBGate : AdapterTensor::kBUp, task.expert);
    b += static_cast<std::int64_t>(at.intermediate_column()) * x_a.rank;
    add_lora(at, rows, x_a, {b, x_a.rank, RightLayout::kNK}, block);
  }
  clock_.lap(at.worker, Stage::kLora);
}

void Engine::HiddenPass::gate_up_block(const BlockTask& at) {
  const WorkerScratch scratch = scratch_of(at.worker);
  float* gate = scratch.blocks[0];
  float* up = scratch.blocks[1];
  clock_.start(at.worker);
  if (has_gate(layer_.activation.kind)) project_block(at, Projection::kGate, gate);
  project_block(at, Projection::kUp, up);
  for (const BatchRows& rows : at.rows.batches) {
    const std::int64_t in_block = rows.shared - at.rows.first;
    finish_rows(at, rows, block_row(gate, in_block), block_row(up, in_block));
  }
  clock_.lap(at.worker, Stage::kActivation);
}

// Keeps gate and up, and makes h of them.
void Engine::HiddenPass::finish_rows(const BlockTask& at, const BatchRows& rows, float* gate, float* up) {
  const Batch& batch = batches_[rows.batch];
  const HiddenStore& store = stores_[rows.batch];
  const bool gated = has_gate(layer_.activation.kind);
  const std::int64_t first = at.intermediate_column(), padded = align_up(at.columns, kBlockDepth);
  for (int m = 0; m < rows.count; ++m) {
    const std::int64_t in_block = std::int64_t{m} * block_stride_, row = std::int64_t{rows.first} + m;
    const std::int64_t kept = row * layer_.intermediate + first;
    if (store.gate != nullptr && gated) std::copy_n(gate + in_block, at.columns, store.gate + kept);
    if (store.up != nullptr) std::copy_n(up + in_block, at.columns, store.up + kept);
    kernels_.activate(layer_.activation, gate + in_block, up + in_block, up + in_block, at.columns);
    std::uint8_t* target = buffers_.h.row(std::int64_t{rows.shared} + m) + first * operand_bytes(kernels_.operand);
    store_operands(kernels_, up + in_block, at.columns, padded, target);
    if (!batch.drops() || batch.lora.rank_down == 0) continue;
    drop_row(mask_of(h_dropout(batch, rows.expert, row)), first, up + in_block, at.columns);
    target = buffers_.own[rows.batch].dropped_h.row(row) + first * operand_bytes(kernels_.operand);
    store_operands(kernels_, up + in_block, at.columns, padded, target);
  }
}

void Engine::HiddenPass::project_h() {
  if (std::none_of(batches_.begin(), batches_.end(), [](const Batch& batch) { return batch.lora.rank_down > 0; })) {
    return;
  }
  for_each_batch_rows([&](const BatchRows& rows, int worker) {
    const Batch& batch = batches_[rows.batch];
    const OwnBuffers& own = buffers_.own[rows.batch];
    if (batch.lora.rank_down == 0) return;
    const F32Matrix matrix{batch.adapter->expert(AdapterTensor::kADown, rows.expert), layer_.intermediate,
                           RightLayout::kNK};
    const LeftRows h = batch.drops() ? own.dropped_h.from(rows.first) : buffers_.h.from(rows.shared);
    const LoraInput input{kernels_, h, matrix, layer_.intermediate};
    project_lora(rows, &input, 1, batch.lora.scale_down * batch.kept_scale(), own.h_a_down, worker);
  });
}

}  // namespace kt_expert
