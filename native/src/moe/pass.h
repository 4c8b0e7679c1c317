// What forward and backward share: how rows and columns are cut into tasks, rows of operands, and LoRA products.
//
// Every product is computed into a block of its worker's scratch and copied from there, so kernels never see an edge
// and never write what another task owns.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "gemm/dropout.h"
#include "gemm/gemm.h"
#include "gemm/tiles.h"
#include "kt_expert/engine.h"
#include "kt_expert/topology.h"
#include "moe/arena.h"
#include "moe/token_sums.h"

namespace kt_expert {

// Blocks of C in a worker's scratch: many rows and few columns, two of which stay in a 512 KiB L2 beside a panel, or
// few rows and many columns, so that weights are read in long stretches.
constexpr int kTaskColumns = 128;
constexpr int kTaskRows = kMostProductRows;
constexpr int kFewRows = 16;
constexpr int kFewRowsColumns = 512;
constexpr std::int64_t kBlockFloats = std::int64_t{kTaskRows + kRowSlack} * kTaskColumns;
static_assert((kFewRows + kRowSlack) * kFewRowsColumns <= kBlockFloats, "both shapes fit");
constexpr int kLeastColumns = 32;   // one block of the weights' depth
constexpr int kPieceRows = 64;      // rows of an elementwise task: long enough to hide the hand-out of tasks
constexpr int kTasksPerWorker = 2;  // at least, so that one slow core is not waited for long
constexpr int kRankAlign = kPanelColumns;

inline std::int64_t ceil_div(std::int64_t extent, std::int64_t width) { return (extent + width - 1) / width; }
inline std::int64_t align_up(std::int64_t extent, std::int64_t unit) { return ceil_div(extent, unit) * unit; }

// Width of fp32 rows of LoRA intermediates.
inline std::int64_t rank_stride(int rank) { return align_up(rank, kRankAlign); }

// Whether an adapter multiplies x, for gate or up.
inline bool reads_x(const AdapterSpec& lora) { return lora.rank_gate > 0 || lora.rank_up > 0; }

// Rows of operands of the ISA, zero up to a multiple of kDepthAlign. The stride is no power of two: rows a power of
// two apart would share a few sets of the cache.
struct OperandRows {
  std::uint8_t* data = nullptr;
  std::int64_t stride = 0;  // elements
  OperandType type = OperandType::kF32;

  static std::int64_t stride_of(std::int64_t width) { return align_up(width, kDepthAlign) + kDepthAlign; }
  static OperandRows take(Carver& carver, const KernelTable& kernels, std::int64_t rows, std::int64_t width) {
    OperandRows taken;
    taken.type = kernels.operand;
    taken.stride = stride_of(width);
    taken.data = carver.take<std::uint8_t>((rows + kRowSlack) * taken.stride * operand_bytes(taken.type));
    return taken;
  }

  std::uint8_t* row(std::int64_t index) const { return data + index * stride * operand_bytes(type); }
  const float* f32() const { return reinterpret_cast<const float*>(data); }
  LeftRows from(std::int64_t first, const std::int32_t* rows = nullptr) const { return {row(first), stride, rows}; }
  LeftRows from_column(std::int64_t first, std::int64_t column) const {
    return {row(first) + column * operand_bytes(type), stride, nullptr};
  }
};

// Writes `count` fp32 values at a column of a row, and zeros up to `padded` values.
inline void store_operands(const KernelTable& kernels, const float* values, std::int64_t count, std::int64_t padded,
                           std::uint8_t* target) {
  if (kernels.operand == OperandType::kF32) {
    float* to = reinterpret_cast<float*>(target);
    std::copy_n(values, count, to);
    std::fill(to + count, to + padded, 0.0f);
  } else {
    bf16_t* to = reinterpret_cast<bf16_t*>(target);
    kernels.f32_to_bf16(values, to, count);
    std::fill(to + count, to + padded, bf16_t{0});
  }
}

// Rows quantised for an ISA that multiplies in integers, in the order of the routes.
struct IntegerBuffer {
  std::int8_t* codes = nullptr;
  float* scales = nullptr;
  std::int64_t stride = 0;

  static IntegerBuffer take(Carver& carver, std::int64_t rows, std::int64_t width) {
    IntegerBuffer buffer;
    buffer.stride = align_up(width, kIntegerDepthAlign) + kIntegerDepthAlign;
    buffer.codes = carver.take<std::int8_t>((rows + kRowSlack) * buffer.stride);
    buffer.scales = carver.take<float>(rows);
    return buffer;
  }
  IntegerRows from(std::int64_t first, std::int64_t column) const {
    return {codes + first * stride + column, stride, scales + first};
  }
};

// Rows of one expert that one task works on.
struct RowTask {
  int expert = 0;
  int first = 0;  // row of the routing
  int count = 0;
};
std::vector<RowTask> row_tasks(const Routing& routing);

// Token rows as operands: once a token, and, where the ISA does not follow row indices, once a route too.
struct TokenOperands {
  OperandRows tokens, gathered;

  static TokenOperands take(Carver& carver, const KernelTable& kernels, std::int64_t tokens, std::int64_t routes,
                            std::int64_t width) {
    TokenOperands operands;
    operands.tokens = OperandRows::take(carver, kernels, tokens, width);
    if (!kernels.gathers) operands.gathered = OperandRows::take(carver, kernels, routes, width);
    return operands;
  }
  LeftRows of(const RowTask& task, const Routing& routing) const {
    if (gathered.data != nullptr) return gathered.from(task.first);
    return tokens.from(0, routing.row_token.data() + task.first);
  }
};

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

// LoRA intermediates of all routes, in fp32. Where the ISA multiplies bf16 they are its operands in two terms, what
// bf16 holds of a value and what it leaves: rounding them once would cost gradients half of the numerics contract, and
// flip the derivative of a clamped activation near its limit.
struct LoraRows {
  int rank = 0;
  float* f32 = nullptr;  // [routes, rank_stride(rank)]
  OperandRows terms[2];

  static LoraRows take(Carver& carver, const KernelTable& kernels, std::int64_t routes, int rank, float* kept) {
    LoraRows rows;
    rows.rank = rank;
    if (rank == 0) return rows;
    rows.f32 = kept != nullptr ? kept : carver.take<float>(routes * rank_stride(rank));
    if (kernels.operand == OperandType::kBf16) {
      for (OperandRows& term : rows.terms) term = OperandRows::take(carver, kernels, routes, rank);
    }
    return rows;
  }
  int term_count() const { return terms[0].data == nullptr ? 1 : 2; }
  const float* row(std::int64_t index) const { return f32 + index * rank_stride(rank); }
  LeftRows from(std::int64_t first, int term) const {
    if (terms[term].data != nullptr) return terms[term].from(first);
    return {row(first), rank_stride(rank), nullptr};
  }
  OuterRows outer(std::int64_t first) const { return {row(first), rank_stride(rank), nullptr}; }
};

// Scratch of one worker: panels, and two blocks of C.
struct WorkerScratch {
  PanelScratch panels;
  float* blocks[2] = {nullptr, nullptr};

  static std::int64_t bytes(const KernelTable& kernels);
  static WorkerScratch at(std::uint8_t* base);
};

// One operation in progress on an engine.
class Engine::Pass {
 protected:
  // `type` is the tokens': it decides the ISA.
  // `lora` has the adapter's ranks, and the scales that count.
  Pass(Engine& engine, FloatType type, const LayerWeights& weights, const AdapterTensors* adapter,
       const AdapterSpec& lora, const Routing& routing, const CancelToken* token, DropoutSeed dropout);

  bool drops() const { return dropout_.seed != 0 && lora_.dropout > 0.0f; }
  // What LoRA's scale is multiplied by where its input is a mask of the values alone: 1 / (1 - p), applied in fp32. A
  // bf16 value and its mask are exact in bf16, their quotient by 1 - p is not.
  float kept_scale() const { return drops() ? 1.0f / (1.0f - lora_.dropout) : 1.0f; }
  static DropoutRow mask_of(DropoutRow row) {
    row.scale = 1.0f;
    return row;
  }
  // The masks of a token's x, and of a row's h.
  DropoutRow x_dropout(std::int64_t token) const { return dropout_row(token, 0); }
  DropoutRow h_dropout(int expert, std::int64_t row) const {
    return dropout_row(routing_.row_token[static_cast<std::size_t>(row)], static_cast<std::uint32_t>(expert) + 1);
  }
  // block += multiply_lora(...), its values dropped like those of the input they are the gradient of; `row_of` gives
  // the mask of a row.
  template <typename RowOf>
  void multiply_dropped_lora(const RowTask& task, const LoraRows& rows, const F32Matrix& matrix, int first_column,
                             int columns, float* block, int worker, const RowOf& row_of) const {
    float* other = scratch_of(worker).blocks[1];
    clear_block(other, task.count, static_cast<int>(align_up(columns, kPanelColumns)));
    multiply_lora(task, rows, matrix, columns, other, worker);
    for (int m = 0; m < task.count; ++m) {
      drop_row(row_of(task.first + m), first_column, block_row(other, m), columns);
      kernels_.add_scaled(1.0f, block_row(other, m), block_row(block, m), columns);
    }
  }

  WorkerScratch scratch_of(int worker) const { return engine_.worker_scratch(worker); }
  // The widest column block that still gives every worker of a node a few tasks.
  int column_width(std::int64_t columns, std::int64_t tasks_per_block) const;
  float* block_row(float* block, std::int64_t row) const { return block + row * block_stride_; }
  void clear_block(float* block, int rows, int columns) const;

  // Runs body(row task, worker) for every row task.
  template <typename Body>
  void for_each_row_task(const Body& body) const {
    pool_.run(
        static_cast<std::int64_t>(row_tasks_.size()),
        [&](std::int64_t task, int worker) { body(row_tasks_[static_cast<std::size_t>(task)], worker); }, token_);
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

  // Runs body(block task) for every row task and every block of the intermediate columns.
  template <typename Body>
  void for_each_hidden_block(const Body& body) const {
    const std::vector<LayerWeights::Slice>& slices = weights_.slices();
    const std::int64_t rows = static_cast<std::int64_t>(row_tasks_.size());
    const int width = column_width(slices.front().count, rows);
    std::array<std::int64_t, kMaxMemoryNodes> counts = {};
    for (std::size_t node = 0; node < slices.size(); ++node) counts[node] = rows * ceil_div(slices[node].count, width);
    pool_.run_on_nodes(
        {counts.data(), slices.size()},
        [&](int node, std::int64_t task, int worker) {
          const LayerWeights::Slice& slice = slices[static_cast<std::size_t>(node)];
          const std::int64_t per_row = ceil_div(slice.count, width);
          const int first = static_cast<int>(task % per_row) * width;
          body(BlockTask{row_tasks_[static_cast<std::size_t>(task / per_row)], slice, first,
                         std::min(width, slice.count - first), worker});
        },
        token_);
  }
  // out[token] = sum over its routes of factor(row) * their rows of the block that fill(block task, block) adds to.
  template <typename Fill, typename Factor>
  void sum_over_routes(const TokenSums& sums, const TokensOut& out, const Fill& fill, const Factor& factor) const {
    const std::vector<LayerWeights::Slice>& slices = weights_.slices();
    const int width = column_width(layer_.hidden, 1);
    std::array<std::int64_t, kMaxMemoryNodes> counts;
    counts.fill(ceil_div(layer_.hidden, width));
    pool_.run_on_nodes(
        {counts.data(), slices.size()},
        [&](int node, std::int64_t task, int worker) {
          const LayerWeights::Slice& slice = slices[static_cast<std::size_t>(node)];
          const int first = static_cast<int>(task) * width, columns = std::min(width, layer_.hidden - first);
          float* part = sums.part(node, out);
          clear_columns(sums, part, first, columns);
          for (const RowTask& rows : row_tasks_) {
            if (token_ != nullptr) token_->check();
            if (slice.count == 0) continue;
            float* block = scratch_of(worker).blocks[0];
            clear_block(block, rows.count, static_cast<int>(align_up(columns, kBlockDepth)));
            fill(BlockTask{rows, slice, first, columns, worker}, block);
            add_rows(rows, block, factor, part + first, columns);
          }
          finish_columns(sums, out, first, columns);
        },
        token_);
    finish_sums(sums, out);
  }
  bool is_first(const LayerWeights::Slice& slice) const { return &slice == &weights_.slices().front(); }

  // Token rows as operands of the ISA.
  void load_operands(TokensIn in, const TokenOperands& target) const;
  // Token rows in fp32, [tokens, H]: `in` itself or a converted copy.
  const float* load_f32(TokensIn in, float* copy) const;
  // x as LoRA sees it where values are dropped: in fp32 with the scale of what stays, and as operands of the ISA
  // without it (see kept_scale).
  void load_dropped_x(TokensIn in, float* copy) const;
  void load_dropped_x(TokensIn in, const TokenOperands& target) const;
  void gather(const TokenOperands& target) const;

  struct LoraInput {
    const KernelTable& kernels;  // whose operands the rows are
    LeftRows rows;
    F32Matrix matrix;
    int depth;
  };
  // target = scale * sum of the inputs' products with their matrices, for the rows of one task.
  void project_lora(const RowTask& task, const LoraInput* inputs, int count, float scale, const LoraRows& target,
                    int worker) const;

  // block += the task's rows of a LoRA intermediate times a matrix of its rank.
  void multiply_lora(const RowTask& task, const LoraRows& rows, const F32Matrix& matrix, int columns, float* block,
                     int worker) const;

  // Sums of one column block: cleared before, converted to the output after; with several nodes `finish_sums` adds the
  // parts once all blocks are done.
  void clear_columns(const TokenSums& sums, float* part, int first_column, int columns) const;
  template <typename Factor>
  void add_rows(const RowTask& rows, const float* block, const Factor& factor, float* target, int columns) const {
    for (int m = 0; m < rows.count; ++m) {
      const std::size_t row = static_cast<std::size_t>(rows.first + m);
      kernels_.add_scaled(factor(row), block + std::int64_t{m} * block_stride_,
                          target + routing_.row_token[row] * static_cast<std::int64_t>(layer_.hidden), columns);
    }
  }
  void finish_columns(const TokenSums& sums, const TokensOut& out, int first_column, int columns) const;
  void finish_sums(const TokenSums& sums, const TokensOut& out) const;

  DropoutRow dropout_row(std::int64_t token, std::uint32_t site) const;

  Engine& engine_;
  const KernelTable& kernels_;
  ThreadPool& pool_;
  const CancelToken* token_;
  const DropoutSeed dropout_;
  const LayerWeights& weights_;
  const LayerSpec& layer_;
  const AdapterTensors* adapter_;
  AdapterSpec lora_;
  const Routing& routing_;
  std::vector<RowTask> row_tasks_;
  int block_stride_;  // of blocks of C, and the widest task
};

}  // namespace kt_expert
