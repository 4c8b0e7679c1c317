// y = sum over routes of w * down(act(gate(x)) * up(x)), LoRA added into each projection's accumulator.
#include "moe/forward.h"

namespace kt_expert {

Engine::ForwardPass::ForwardPass(Engine& engine, const ForwardArgs& args, Carver& carver, const HiddenStore& store)
    : HiddenPass(engine, args.x.type, *args.weights, args.lora, args.routing, args.token, carver, store), args_(args) {
  sums_ =
      TokenSums::take(carver, routing_.tokens, layer_.hidden, static_cast<int>(weights_.slices().size()), args.y.type);
}

std::int64_t Engine::ForwardPass::scratch_bytes(const KernelTable& kernels, const LayerSpec& layer,
                                                const LoraSpec& lora, std::int64_t tokens, std::int64_t routes,
                                                int nodes, int workers) {
  Carver carver(nullptr);
  HiddenPass::reserve(carver, kernels, layer, lora, tokens, routes, workers);
  TokenSums::take(carver, tokens, layer.hidden, nodes, FloatType::kBf16);
  return carver.used();
}

std::unique_ptr<Ticket> Engine::ForwardPass::run(Engine& engine, const ForwardArgs& args) {
  const LayerSpec& layer = args.weights->spec();
  const LoraSpec lora = args.lora == nullptr ? LoraSpec{} : args.lora->lora();
  const std::int64_t needed =
      scratch_bytes(engine.kernels_for_tokens(args.x.type), layer, lora, args.routing.tokens, args.routing.routes,
                    static_cast<int>(args.weights->slices().size()), engine.threads());
  Carver carver(engine.arena_->reset(needed));
  std::unique_ptr<Ticket> ticket;
  HiddenStore store;
  if (args.save != SavePolicy::kNothing) {
    ticket = std::make_unique<Ticket>(layer, lora, args.routing, args.x.type, args.save);
    store = ticket->store();
    std::copy_n(static_cast<const std::uint8_t*>(args.x.data), ticket->x_.size(), ticket->x_.data());
  }
  ForwardPass pass(engine, args, carver, store);
  pass.HiddenPass::run(args.x);
  pass.down();
  return ticket;
}

void Engine::ForwardPass::down() {
  const std::vector<LayerWeights::Slice>& slices = weights_.slices();
  const int width = column_width(layer_.hidden, 1);
  const std::int64_t per_node = ceil_div(layer_.hidden, width);
  pool_.run_on_nodes(
      std::vector<std::int64_t>(slices.size(), per_node),
      [&](int node, std::int64_t task, int worker) {
        const int first = static_cast<int>(task) * width;
        down_block(node, first, std::min(width, layer_.hidden - first), worker);
      },
      token_);
  finish_sums(sums_, args_.y);
}

void Engine::ForwardPass::down_block(int node, int first_column, int columns, int worker) {
  const LayerWeights::Slice& slice = weights_.slices()[static_cast<std::size_t>(node)];
  float* sums = sums_.part(node, args_.y);
  clear_columns(sums_, sums, first_column, columns);
  for (const RowTask& task : row_tasks_) {
    if (token_ != nullptr) token_->check();
    if (slice.count > 0) down_rows(task, slice, node == 0, first_column, columns, sums, worker);
  }
  finish_columns(sums_, args_.y, first_column, columns);
}

void Engine::ForwardPass::down_rows(const RowTask& task, const LayerWeights::Slice& slice, bool first_slice,
                                    int first_column, int columns, float* sums, int worker) {
  const WorkerScratch scratch = scratch_of(worker);
  float* block = scratch.blocks[0];
  const int padded = static_cast<int>(align_up(columns, kPanelColumns));
  clear_block(block, task.count, padded);
  const float* bias = weights_.bias(Projection::kDown, task.expert);
  for (int m = 0; first_slice && bias != nullptr && m < task.count; ++m) {
    std::copy_n(bias + first_column, columns, block_row(block, m));
  }
  const PackedMatrix matrix = slice.matrix(Projection::kDown, task.expert);
  const int first_block = first_column / kBlockRows, blocks = padded / kBlockRows;
  if (in_integers()) {
    kernels_.integer->multiply(h_codes().from(task.first, slice.first), task.count, matrix, first_block, blocks, block,
                               block_stride_);
  } else {
    multiply_forward(kernels_, h().from_column(task.first, slice.first), task.count, matrix, first_block, blocks, block,
                     block_stride_, scratch.panels);
  }
  const int rank = lora_.rank_down;
  if (first_slice && rank > 0) {
    const float* b = adapter_->expert(LoraTensor::kBDown, task.expert) + static_cast<std::int64_t>(first_column) * rank;
    multiply_lora(task, h_a_down(), {b, rank, RightLayout::kNK}, columns, block, worker);
  }
  for (int m = 0; m < task.count; ++m) {
    const std::size_t row = static_cast<std::size_t>(task.first + m);
    kernels_.add_scaled(routing_.row_weight[row], block_row(block, m),
                        sums + routing_.row_token[row] * static_cast<std::int64_t>(layer_.hidden) + first_column,
                        columns);
  }
}

}  // namespace kt_expert
