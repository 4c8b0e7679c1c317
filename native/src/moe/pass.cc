#include "moe/pass.h"

#include <cstring>
#include <utility>

namespace kt_expert {

std::int64_t WorkerScratch::bytes(const KernelTable& kernels) {
  Carver carver(nullptr);
  for (int b = 0; b < kBlocks; ++b) carver.take<float>(kBlockFloats);
  carver.take<std::uint8_t>(panel_scratch_bytes(kernels));
  return carver.used();
}

WorkerScratch WorkerScratch::at(std::uint8_t* base) {
  Carver carver(base);
  WorkerScratch scratch;
  for (float*& block : scratch.blocks) block = carver.take<float>(kBlockFloats);
  scratch.panels.panels = carver.take<std::uint8_t>(0);
  return scratch;
}

Engine::Pass::Pass(Engine& engine, FloatType type, const LayerWeights& weights, std::vector<Batch> batches,
                   const CancelToken* token, StageClock& clock)
    : engine_(engine),
      clock_(clock),
      kernels_(engine.kernels_for_tokens(type)),
      pool_(engine.pool_),
      token_(token),
      weights_(weights),
      layer_(weights.spec()),
      batches_(std::move(batches)),
      plan_(batches_) {
  int most_rows = 0;
  for (const RowTask& task : plan_.row_tasks()) most_rows = std::max(most_rows, task.count);
  block_stride_ = most_rows <= kFewRows ? kFewRowsColumns : kTaskColumns;
}

int Engine::Pass::column_width(std::int64_t columns, std::int64_t tasks_per_block) const {
  const std::int64_t workers = ceil_div(pool_.size(), static_cast<std::int64_t>(weights_.slices().size()));
  int width = block_stride_;
  while (width > kLeastColumns && ceil_div(columns, width) * tasks_per_block < kTasksPerWorker * workers) width /= 2;
  return width;
}

void Engine::Pass::clear_block(float* block, int rows, int columns) const {
  for (int m = 0; m < rows; ++m) std::fill_n(block_row(block, m), columns, 0.0f);
}

void Engine::Pass::load_operands(const std::vector<TokensIn>& in, const TokenOperands& target) const {
  const std::int64_t width = layer_.hidden, padded = align_up(width, kDepthAlign);
  for_each_token_piece([&](const TokenPiece& piece, int) {
    const TokensIn from = in[piece.batch];
    for (std::int64_t t = piece.first; t < piece.last; ++t) {
      std::uint8_t* row = target.tokens.row(plan_.first_token(piece.batch) + t);
      if (from.type == FloatType::kF32) {
        store_operands(kernels_, static_cast<const float*>(from.data) + t * width, width, padded, row);
      } else if (kernels_.operand == OperandType::kBf16) {
        bf16_t* to = reinterpret_cast<bf16_t*>(row);
        std::copy_n(static_cast<const bf16_t*>(from.data) + t * width, width, to);
        std::fill(to + width, to + padded, bf16_t{0});
      } else {
        float* to = reinterpret_cast<float*>(row);
        kernels_.bf16_to_f32(static_cast<const bf16_t*>(from.data) + t * width, to, width);
        std::fill(to + width, to + padded, 0.0f);
      }
    }
  });
  gather(target, plan_.row_token(), plan_.routes());
}

void Engine::Pass::gather(const TokenOperands& target, const std::int32_t* row_token, std::int64_t routes) const {
  if (target.gathered.data == nullptr) return;
  const std::size_t bytes =
      static_cast<std::size_t>(align_up(layer_.hidden, kDepthAlign) * operand_bytes(kernels_.operand));
  for_each_piece(routes, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t row = first; row < last; ++row) {
      std::memcpy(target.gathered.row(row), target.tokens.row(row_token[row]), bytes);
    }
  });
}

DropoutRow Engine::Pass::dropout_row(const Batch& batch, std::int64_t token, std::uint32_t site) const {
  constexpr double kWords = 4294967296.0;  // 2^32
  return {batch.dropout.seed,
          batch.dropout.layer,
          static_cast<std::uint32_t>(token) + batch.dropout.first_token,
          site,
          static_cast<std::uint32_t>(static_cast<double>(batch.lora.dropout) * kWords),
          1.0f / (1.0f - batch.lora.dropout)};
}

void Engine::Pass::load_dropped_x(std::size_t index, TokensIn in, float* copy) const {
  const Batch& batch = batches_[index];
  const std::int64_t width = layer_.hidden;
  const float* loaded = load_f32(index, in, copy);
  for_each_piece(batch.routing->tokens, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      if (loaded != copy) std::copy_n(loaded + t * width, width, copy + t * width);
      drop_row(x_dropout(batch, t), 0, copy + t * width, width);
    }
  });
}

void Engine::Pass::load_dropped_x(std::size_t index, TokensIn in, const TokenOperands& target) const {
  const Batch& batch = batches_[index];
  const std::int64_t width = layer_.hidden, padded = align_up(width, kDepthAlign);
  for_each_piece(batch.routing->tokens, [&](std::int64_t first, std::int64_t last, int worker) {
    float* row = scratch_of(worker).blocks[0];
    for (std::int64_t t = first; t < last; ++t) {
      for (std::int64_t c = 0; c < width; c += kBlockFloats) {
        const std::int64_t count = std::min(kBlockFloats, width - c), end = c + count == width ? padded - c : count;
        if (in.type == FloatType::kF32) {
          std::copy_n(static_cast<const float*>(in.data) + t * width + c, count, row);
        } else {
          kernels_.bf16_to_f32(static_cast<const bf16_t*>(in.data) + t * width + c, row, count);
        }
        drop_row(mask_of(x_dropout(batch, t)), c, row, count);
        store_operands(kernels_, row, count, end, target.tokens.row(t) + c * operand_bytes(kernels_.operand));
      }
    }
  });
  gather(target, batch.routing->row_token.data(), batch.routing->routes);
}

const float* Engine::Pass::load_f32(std::size_t batch, TokensIn in, float* copy) const {
  if (in.type == FloatType::kF32) return static_cast<const float*>(in.data);
  const bf16_t* source = static_cast<const bf16_t*>(in.data);
  const std::int64_t width = layer_.hidden;
  for_each_piece(batches_[batch].routing->tokens, [&](std::int64_t first, std::int64_t last, int) {
    kernels_.bf16_to_f32(source + first * width, copy + first * width, (last - first) * width);
  });
  return copy;
}

void Engine::Pass::clear_columns(const TokenSums& sums, int node, const std::vector<TokensOut>& outs, int first_column,
                                 int columns) const {
  for (std::size_t b = 0; b < batches_.size(); ++b) {
    for (std::int64_t t = 0; t < batches_[b].routing->tokens; ++t) {
      std::fill_n(sum_row(sums, node, outs, b, t) + first_column, columns, 0.0f);
    }
  }
}

void Engine::Pass::finish_columns(const TokenSums& sums, const std::vector<TokensOut>& outs, int first_column,
                                  int columns) const {
  if (sums.nodes > 1 || sums.parts == nullptr) return;
  for (std::size_t b = 0; b < batches_.size(); ++b) {
    for (std::int64_t t = 0; t < batches_[b].routing->tokens; ++t) {
      bf16_t* out = static_cast<bf16_t*>(outs[b].data) + t * sums.width + first_column;
      kernels_.f32_to_bf16(sum_row(sums, 0, outs, b, t) + first_column, out, columns);
    }
  }
}

void Engine::Pass::finish_sums(const TokenSums& sums, const std::vector<TokensOut>& outs) const {
  if (sums.nodes == 1) return;
  for_each_token_piece([&](const TokenPiece& piece, int) {
    const std::int64_t at = piece.first * sums.width, count = (piece.last - piece.first) * sums.width;
    float* total = sum_row(sums, 0, outs, piece.batch, piece.first);
    for (int node = 1; node < sums.nodes; ++node) {
      kernels_.add_scaled(1.0f, sum_row(sums, node, outs, piece.batch, piece.first), total, count);
    }
    const TokensOut out = outs[piece.batch];
    if (out.type == FloatType::kBf16) {
      kernels_.f32_to_bf16(total, static_cast<bf16_t*>(out.data) + at, count);
    } else {
      std::copy_n(total, count, static_cast<float*>(out.data) + at);
    }
  });
}

void Engine::Pass::project_lora(const BatchRows& rows, const LoraInput* inputs, int count, float scale,
                                const LoraRows& target, int worker) const {
  const WorkerScratch scratch = scratch_of(worker);
  float* block = scratch.blocks[0];
  const std::int64_t stride = rank_stride(target.rank);
  for (int n0 = 0; n0 < target.rank; n0 += block_stride_) {
    const int columns = std::min(block_stride_, target.rank - n0);
    const int padded = static_cast<int>(align_up(columns, kRankAlign));
    clear_block(block, rows.count, padded);
    for (int i = 0; i < count; ++i) {
      F32Matrix part = inputs[i].matrix;
      part.data += part.layout == RightLayout::kNK ? n0 * part.stride : n0;
      multiply_f32(inputs[i].kernels, inputs[i].rows, rows.count, part, columns, inputs[i].depth, block, block_stride_,
                   scratch.panels);
    }
    for (int m = 0; m < rows.count; ++m) {
      float* row = target.f32 + (rows.first + m) * stride + n0;
      std::copy_n(block_row(block, m), padded, row);
      kernels_.scale(scale, row, columns);
    }
  }
  if (target.term_count() == 1) return;
  const std::int64_t padded = align_up(target.rank, kDepthAlign);
  float* rest = scratch.blocks[1];
  for (int m = 0; m < rows.count; ++m) {
    const std::int64_t row = rows.first + m;
    std::copy_n(target.row(row), target.rank, rest);
    for (const OperandRows& term : target.terms) {
      store_operands(kernels_, rest, target.rank, padded, term.row(row));
      const bf16_t* stored = reinterpret_cast<const bf16_t*>(term.row(row));
      for (int j = 0; j < target.rank; ++j) rest[j] -= bf16_to_float(stored[j]);
    }
  }
}

void Engine::Pass::add_lora(const BlockTask& at, const BatchRows& rows, const LoraRows& left, const F32Matrix& matrix,
                            float* block) const {
  float* into = block_row(block, rows.shared - at.rows.first);
  const bool is_last = rows.shared + rows.count == at.rows.first + at.rows.count;
  if (is_last) {
    multiply_lora(rows, left, matrix, at.columns, into, at.worker);
    return;
  }
  // A kernel may write past the last row (kRowSlack): the next batch's must not lie there.
  float* apart = scratch_of(at.worker).blocks[WorkerScratch::kBlocks - 1];
  const std::int64_t padded = align_up(at.columns, kPanelColumns);
  for (int m = 0; m < rows.count; ++m) std::copy_n(block_row(into, m), padded, block_row(apart, m));
  multiply_lora(rows, left, matrix, at.columns, apart, at.worker);
  for (int m = 0; m < rows.count; ++m) std::copy_n(block_row(apart, m), padded, block_row(into, m));
}

void Engine::Pass::multiply_lora(const BatchRows& rows, const LoraRows& left, const F32Matrix& matrix, int columns,
                                 float* block, int worker) const {
  for (int term = 0; term < left.term_count(); ++term) {
    multiply_f32(kernels_, left.from(rows.first, term), rows.count, matrix, columns, left.rank, block, block_stride_,
                 scratch_of(worker).panels);
  }
}

}  // namespace kt_expert
