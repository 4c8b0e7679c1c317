// What forward and backward share: blocks of C and how tasks go over them, rows of operands, and LoRA products.
//
// Every product is computed into a block of its worker's scratch and copied from there, so kernels never see an edge
// and never write what another task owns.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "gemm/dropout.h"
#include "gemm/gemm.h"
#include "kt_expert/engine.h"
#include "kt_expert/topology.h"
#include "moe/arena.h"
#include "moe/batches.h"
#include "moe/operands.h"
#include "moe/stage_clock.h"
#include "moe/tasks.h"
#include "moe/token_sums.h"

namespace kt_expert {

// A block of C: a task's rows and some columns, over one slice of the weights, by one worker.
struct BlockTask {
  const RowTask& rows;
  const LayerWeights::Slice& slice;
  int first_column;  // of the slice's I, or of H
  int columns;
  int worker;

  int intermediate_column() const { return slice.first + first_column; }
  // Whole blocks of weights, and what they are counted in.
  int row_blocks() const { return static_cast<int>(ceil_div(columns, kBlockRows)); }
  int depth_blocks() const { return static_cast<int>(ceil_div(columns, kBlockDepth)); }
};

// Scratch of one worker: panels, and blocks of C. The last is for rows that must not lie beside others' while they are
// computed.
struct WorkerScratch {
  static constexpr int kBlocks = 3;

  PanelScratch panels;
  float* blocks[kBlocks] = {};

  static std::int64_t bytes(const KernelTable& kernels);
  static WorkerScratch at(std::uint8_t* base);
};

// One operation in progress on an engine, for one batch or several that share the reading of weights.
class Engine::Pass {
 protected:
  // `type` is the tokens': it decides the ISA. There is at least one batch. `token` is for the whole.
  Pass(Engine& engine, FloatType type, const LayerWeights& weights, std::vector<Batch> batches,
       const CancelToken* token, StageClock& clock);

  static DropoutRow mask_of(DropoutRow row) {
    row.scale = 1.0f;
    return row;
  }
  // The masks of a token's x, and of a row's h.
  DropoutRow x_dropout(const Batch& batch, std::int64_t token) const { return dropout_row(batch, token, 0); }
  DropoutRow h_dropout(const Batch& batch, int expert, std::int64_t row) const {
    const std::int32_t token = batch.routing->row_token[static_cast<std::size_t>(row)];
    return dropout_row(batch, token, static_cast<std::uint32_t>(expert) + 1);
  }

  WorkerScratch scratch_of(int worker) const { return engine_.worker_scratch(worker); }
  // The widest column block that still gives every worker of a node a few tasks.
  int column_width(std::int64_t columns, std::int64_t tasks_per_block) const;
  float* block_row(float* block, std::int64_t row) const { return block + row * block_stride_; }
  void clear_block(float* block, int rows, int columns) const;

  // Runs body(batch rows, worker) for the rows of every batch of every task.
  template <typename Body>
  void for_each_batch_rows(const Body& body) const {
    const std::vector<BatchRows>& all = plan_.batch_rows();
    pool_.run(
        static_cast<std::int64_t>(all.size()),
        [&](std::int64_t task, int worker) { body(all[static_cast<std::size_t>(task)], worker); }, token_);
  }
  // Runs body(first, last, worker) over [0, count) in pieces of kPieceRows.
  template <typename Body>
  void for_each_piece(std::int64_t count, const Body& body) const {
    pool_.run(
        ceil_div(count, kPieceRows),
        [&](std::int64_t task, int worker) {
          body(task * kPieceRows, std::min<std::int64_t>(count, (task + 1) * kPieceRows), worker);
        },
        token_);
  }
  // Runs body(token piece, worker) over the tokens of all batches.
  template <typename Body>
  void for_each_token_piece(const Body& body) const {
    const std::vector<TokenPiece>& all = plan_.token_pieces();
    pool_.run(
        static_cast<std::int64_t>(all.size()),
        [&](std::int64_t task, int worker) { body(all[static_cast<std::size_t>(task)], worker); }, token_);
  }

  // Runs body(block task) for every row task and every block of the intermediate columns.
  template <typename Body>
  void for_each_hidden_block(const Body& body) const {
    const std::vector<LayerWeights::Slice>& slices = weights_.slices();
    const std::vector<RowTask>& tasks = plan_.row_tasks();
    const std::int64_t rows = static_cast<std::int64_t>(tasks.size());
    const int width = column_width(slices.front().count, rows);
    std::array<std::int64_t, kMaxMemoryNodes> counts = {};
    for (std::size_t node = 0; node < slices.size(); ++node) counts[node] = rows * ceil_div(slices[node].count, width);
    pool_.run_on_nodes(
        {counts.data(), slices.size()},
        [&](int node, std::int64_t task, int worker) {
          const LayerWeights::Slice& slice = slices[static_cast<std::size_t>(node)];
          const std::int64_t per_row = ceil_div(slice.count, width);
          const int first = static_cast<int>(task % per_row) * width;
          body(BlockTask{tasks[static_cast<std::size_t>(task / per_row)], slice, first,
                         std::min(width, slice.count - first), worker});
        },
        token_);
  }
  // out[token] = sum over its routes of factor(batch rows, row) * their rows of the block that fill(block task, block)
  // adds to. `outs`: of each batch.
  template <typename Fill, typename Factor>
  void sum_over_routes(const TokenSums& sums, const std::vector<TokensOut>& outs, const Fill& fill,
                       const Factor& factor) const {
    const std::vector<LayerWeights::Slice>& slices = weights_.slices();
    const int width = column_width(layer_.hidden, 1);
    std::array<std::int64_t, kMaxMemoryNodes> counts;
    counts.fill(ceil_div(layer_.hidden, width));
    pool_.run_on_nodes(
        {counts.data(), slices.size()},
        [&](int node, std::int64_t task, int worker) {
          const LayerWeights::Slice& slice = slices[static_cast<std::size_t>(node)];
          const int first = static_cast<int>(task) * width, columns = std::min(width, layer_.hidden - first);
          clock_.start(worker);
          clear_columns(sums, node, outs, first, columns);
          for (const RowTask& rows : plan_.row_tasks()) {
            if (token_ != nullptr) token_->check();
            if (slice.count == 0) continue;
            float* block = scratch_of(worker).blocks[0];
            clear_block(block, rows.count, static_cast<int>(align_up(columns, kBlockDepth)));
            fill(BlockTask{rows, slice, first, columns, worker}, block);
            for (const BatchRows& part : rows.batches) {
              add_rows(sums, node, outs, part, block_row(block, part.shared - rows.first), factor, first, columns);
            }
            clock_.lap(worker, Stage::kScatter);
          }
          finish_columns(sums, outs, first, columns);
          clock_.lap(worker, Stage::kScatter);
        },
        token_);
    finish_sums(sums, outs);
  }
  bool is_first(const LayerWeights::Slice& slice) const { return &slice == &weights_.slices().front(); }

  // Token rows as operands of the ISA. `in`: of each batch.
  void load_operands(const std::vector<TokensIn>& in, const TokenOperands& target) const;
  // Token rows of one batch in fp32, [tokens, H]: `in` itself or a converted copy.
  const float* load_f32(std::size_t batch, TokensIn in, float* copy) const;
  // x as LoRA sees it where values are dropped: in fp32 with the scale of what stays, and as operands of the ISA
  // without it (see Batch::kept_scale), of one batch.
  void load_dropped_x(std::size_t batch, TokensIn in, float* copy) const;
  void load_dropped_x(std::size_t batch, TokensIn in, const TokenOperands& target) const;
  void gather(const TokenOperands& target, const std::int32_t* row_token, std::int64_t routes) const;

  struct LoraInput {
    const KernelTable& kernels;  // whose operands the rows are
    LeftRows rows;
    F32Matrix matrix;
    int depth;
  };
  // target = scale * sum of the inputs' products with their matrices, for rows of one batch.
  void project_lora(const BatchRows& rows, const LoraInput* inputs, int count, float scale, const LoraRows& target,
                    int worker) const;

  // The batch's rows of the block += its rows of a LoRA intermediate times a matrix of its rank.
  void add_lora(const BlockTask& at, const BatchRows& rows, const LoraRows& left, const F32Matrix& matrix,
                float* block) const;
  // The same, the products' values dropped like those of the input they are the gradient of; `mask` gives the mask of a
  // row.
  template <typename Mask>
  void add_dropped_lora(const BlockTask& at, const BatchRows& rows, const LoraRows& left, const F32Matrix& matrix,
                        int first_column, float* block, const Mask& mask) const {
    float* other = scratch_of(at.worker).blocks[WorkerScratch::kBlocks - 1];
    clear_block(other, rows.count, static_cast<int>(align_up(at.columns, kPanelColumns)));
    multiply_lora(rows, left, matrix, at.columns, other, at.worker);
    float* into = block_row(block, rows.shared - at.rows.first);
    for (int m = 0; m < rows.count; ++m) {
      drop_row(mask(rows.first + m), first_column, block_row(other, m), at.columns);
      kernels_.add_scaled(1.0f, block_row(other, m), block_row(into, m), at.columns);
    }
  }

  DropoutRow dropout_row(const Batch& batch, std::int64_t token, std::uint32_t site) const;

  Engine& engine_;
  StageClock& clock_;
  const KernelTable& kernels_;
  ThreadPool& pool_;
  const CancelToken* token_;
  const LayerWeights& weights_;
  const LayerSpec& layer_;
  const std::vector<Batch> batches_;
  const BatchPlan plan_;
  int block_stride_;  // of blocks of C, and the widest task

 private:
  void multiply_lora(const BatchRows& rows, const LoraRows& left, const F32Matrix& matrix, int columns, float* block,
                     int worker) const;
  // A token's sums of one memory node.
  float* sum_row(const TokenSums& sums, int node, const std::vector<TokensOut>& outs, std::size_t batch,
                 std::int64_t token) const {
    if (sums.parts == nullptr) return static_cast<float*>(outs[batch].data) + token * sums.width;
    return sums.parts + (node * sums.tokens + plan_.first_token(batch) + token) * sums.width;
  }
  // Sums of one column block: cleared before, converted to the output after; with several nodes `finish_sums` adds the
  // parts once all blocks are done.
  void clear_columns(const TokenSums& sums, int node, const std::vector<TokensOut>& outs, int first_column,
                     int columns) const;
  template <typename Factor>
  void add_rows(const TokenSums& sums, int node, const std::vector<TokensOut>& outs, const BatchRows& rows,
                const float* block, const Factor& factor, int first_column, int columns) const {
    const std::int32_t* tokens = batches_[rows.batch].routing->row_token.data() + rows.first;
    for (int m = 0; m < rows.count; ++m) {
      kernels_.add_scaled(factor(rows, static_cast<std::size_t>(rows.first + m)),
                          block + std::int64_t{m} * block_stride_,
                          sum_row(sums, node, outs, rows.batch, tokens[m]) + first_column, columns);
    }
  }
  void finish_columns(const TokenSums& sums, const std::vector<TokensOut>& outs, int first_column, int columns) const;
  void finish_sums(const TokenSums& sums, const std::vector<TokensOut>& outs) const;
};

}  // namespace kt_expert
