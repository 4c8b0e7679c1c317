#include "moe/hidden.h"

#include <cstring>

namespace kt_expert {

Engine::HiddenPass::HiddenPass(Engine& engine, FloatType type, const LayerWeights& weights, const LoraTensors* adapter,
                               const Routing& routing, const CancelToken* token, Carver& carver,
                               const HiddenStore& store)
    : Pass(engine, type, weights, adapter, routing, token), store_(store) {
  buffers_ = take(carver, kernels_, layer_, lora_, routing.tokens, routing.routes, pool_.size(), store);
}

Engine::HiddenPass::Buffers Engine::HiddenPass::take(Carver& carver, const KernelTable& kernels, const LayerSpec& layer,
                                                     const LoraSpec& lora, std::int64_t tokens, std::int64_t routes,
                                                     int workers, const HiddenStore& store) {
  Buffers buffers;
  buffers.x = OperandRows::take(carver, kernels, tokens, layer.hidden);
  if (!kernels.gathers) buffers.gathered = OperandRows::take(carver, kernels, routes, layer.hidden);
  buffers.h = OperandRows::take(carver, kernels, routes, layer.intermediate);
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
                                 const LoraSpec& lora, std::int64_t tokens, std::int64_t routes, int workers) {
  take(carver, kernels, layer, lora, tokens, routes, workers, HiddenStore{});
}

void Engine::HiddenPass::run(TokensIn x) {
  load_operands(x, buffers_.x);
  gather();
  if (in_integers()) quantise(buffers_.x, routing_.row_token.data(), layer_.hidden, buffers_.x_codes);
  project_x();
  gate_up();
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

LeftRows Engine::HiddenPass::x_rows(const RowTask& task) const {
  if (kernels_.gathers) return buffers_.x.from(0, routing_.row_token.data() + task.first);
  return buffers_.gathered.from(task.first);
}

void Engine::HiddenPass::gather() {
  if (kernels_.gathers) return;
  const std::size_t bytes =
      static_cast<std::size_t>(align_up(layer_.hidden, kDepthAlign) * operand_bytes(kernels_.operand));
  for_each_piece(routing_.routes, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t row = first; row < last; ++row) {
      std::memcpy(buffers_.gathered.row(row), buffers_.x.row(routing_.row_token[static_cast<std::size_t>(row)]), bytes);
    }
  });
}

void Engine::HiddenPass::project_x() {
  if (lora_.rank_gate == 0 && lora_.rank_up == 0) return;
  for_each_row_task([&](const RowTask& task, int worker) {
    const auto project = [&](LoraTensor a, float scale, const LoraRows& target) {
      if (target.rank == 0) return;
      const F32Matrix matrix{adapter_->expert(a, task.expert), layer_.hidden, RightLayout::kNK};
      const LoraInput input{kernels_, x_rows(task), matrix, layer_.hidden};
      project_lora(task, &input, 1, scale, target, worker);
    };
    project(LoraTensor::kAGate, lora_.scale_gate, buffers_.x_a_gate);
    if (!lora_.tied) project(LoraTensor::kAUp, lora_.scale_up, buffers_.x_a_up);
  });
}

void Engine::HiddenPass::gate_up() {
  const std::vector<LayerWeights::Slice>& slices = weights_.slices();
  const std::int64_t rows = static_cast<std::int64_t>(row_tasks_.size());
  const int width = column_width(slices.front().count, rows);
  std::vector<std::int64_t> counts;
  for (const LayerWeights::Slice& slice : slices) counts.push_back(rows * ceil_div(slice.count, width));
  pool_.run_on_nodes(
      counts,
      [&](int node, std::int64_t task, int worker) {
        const LayerWeights::Slice& slice = slices[static_cast<std::size_t>(node)];
        const std::int64_t per_row = ceil_div(slice.count, width);
        const int first = static_cast<int>(task % per_row) * width;
        gate_up_block(row_tasks_[static_cast<std::size_t>(task / per_row)], slice, first,
                      std::min(width, slice.count - first), worker);
      },
      token_);
}

// block = x W^T (+ bias, + LoRA) for a block of columns; columns past the slice's come out zero.
void Engine::HiddenPass::project_column_block(const RowTask& task, const LayerWeights::Slice& slice,
                                              Projection projection, int first_column, int columns, float* block,
                                              int worker) const {
  const WorkerScratch scratch = scratch_of(worker);
  const int padded = static_cast<int>(align_up(columns, kBlockDepth));
  const int global_first = slice.first + first_column;
  clear_block(block, task.count, padded);
  if (const float* bias = weights_.bias(projection, task.expert); bias != nullptr) {
    for (int m = 0; m < task.count; ++m) {
      std::copy_n(bias + global_first, columns, block_row(block, m));
    }
  }
  const PackedMatrix matrix = slice.matrix(projection, task.expert);
  const int first_block = first_column / kBlockRows, blocks = padded / kBlockRows;
  if (in_integers()) {
    kernels_.integer->multiply(buffers_.x_codes.from(task.first, 0), task.count, matrix, first_block, blocks, block,
                               block_stride_);
  } else {
    multiply_forward(kernels_, x_rows(task), task.count, matrix, first_block, blocks, block, block_stride_,
                     scratch.panels);
  }
  const bool is_gate = projection == Projection::kGate;
  const LoraRows& x_a = is_gate ? buffers_.x_a_gate : buffers_.x_a_up;
  if (x_a.rank == 0) return;
  const float* b = adapter_->expert(is_gate ? LoraTensor::kBGate : LoraTensor::kBUp, task.expert);
  multiply_lora(task, x_a, {b + static_cast<std::int64_t>(global_first) * x_a.rank, x_a.rank, RightLayout::kNK},
                columns, block, worker);
}

void Engine::HiddenPass::gate_up_block(const RowTask& task, const LayerWeights::Slice& slice, int first_column,
                                       int columns, int worker) {
  const WorkerScratch scratch = scratch_of(worker);
  float* gate = scratch.blocks[0];
  float* up = scratch.blocks[1];
  const bool gated = has_gate(layer_.activation.kind);
  if (gated) project_column_block(task, slice, Projection::kGate, first_column, columns, gate, worker);
  project_column_block(task, slice, Projection::kUp, first_column, columns, up, worker);
  const int global_first = slice.first + first_column;
  const std::int64_t padded = align_up(columns, kBlockDepth);
  for (int m = 0; m < task.count; ++m) {
    const std::int64_t in_block = std::int64_t{m} * block_stride_;
    const std::int64_t kept = (static_cast<std::int64_t>(task.first) + m) * layer_.intermediate + global_first;
    if (store_.gate != nullptr && gated) std::copy_n(gate + in_block, columns, store_.gate + kept);
    if (store_.up != nullptr) std::copy_n(up + in_block, columns, store_.up + kept);
    kernels_.activate(layer_.activation, gate + in_block, up + in_block, up + in_block, columns);
    std::uint8_t* target =
        buffers_.h.row(task.first + m) + static_cast<std::int64_t>(global_first) * operand_bytes(kernels_.operand);
    store_operands(kernels_, up + in_block, columns, padded, target);
  }
}

void Engine::HiddenPass::project_h() {
  if (lora_.rank_down == 0) return;
  for_each_row_task([&](const RowTask& task, int worker) {
    const F32Matrix matrix{adapter_->expert(LoraTensor::kADown, task.expert), layer_.intermediate, RightLayout::kNK};
    const LoraInput input{kernels_, buffers_.h.from(task.first), matrix, layer_.intermediate};
    project_lora(task, &input, 1, lora_.scale_down, buffers_.h_a_down, worker);
  });
}

}  // namespace kt_expert
