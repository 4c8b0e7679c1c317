// Batches that share one reading of the weights, and where each one's rows lie among all.
//
// Every batch has routes, an adapter, a dropout and a ticket of its own. Only the products with the base model's
// weights are computed for the rows of all of them together, and a row's bits do not depend on what is multiplied
// beside it: so a batch gets what it would get alone.
#pragma once

#include <cstdint>
#include <vector>

#include "kt_expert/engine.h"

namespace kt_expert {

// Whether LoRA multiplies x, for gate or up.
inline bool reads_x(const AdapterSpec& lora) { return lora.rank_gate > 0 || lora.rank_up > 0; }

struct Batch {
  const AdapterTensors* adapter = nullptr;
  AdapterSpec lora;  // the adapter's ranks, and the scales that count
  const Routing* routing = nullptr;
  DropoutSeed dropout;

  bool drops() const { return dropout.seed != 0 && lora.dropout > 0.0f; }
  // What LoRA's scale is multiplied by where its input is a mask of the values alone: 1 / (1 - p), applied in fp32. A
  // bf16 value and its mask are exact in bf16, their quotient by 1 - p is not.
  float kept_scale() const { return drops() ? 1.0f / (1.0f - lora.dropout) : 1.0f; }
  bool reads_x() const { return kt_expert::reads_x(lora); }
};

// What a batch's memory depends on.
struct BatchSize {
  AdapterSpec lora;
  std::int64_t tokens = 0;
  std::int64_t routes = 0;

  bool reads_x() const { return kt_expert::reads_x(lora); }
};

std::vector<BatchSize> sizes_of(const std::vector<Batch>& batches);
// Tokens and routes of all.
BatchSize sum_of(const std::vector<BatchSize>& batches);

// Rows of one expert and one batch: neighbours in the batch's routing, and among the rows of all.
struct BatchRows {
  std::size_t batch = 0;
  int expert = 0;
  int first = 0;   // row of the batch's routing
  int shared = 0;  // row among those of all batches
  int count = 0;
};

// Rows of one expert that one task works on.
struct RowTask {
  int expert = 0;
  int first = 0;  // row among those of all batches
  int count = 0;
  Span<const BatchRows> batches;
};

// Tokens of one batch that one task works on.
struct TokenPiece {
  std::size_t batch = 0;
  std::int64_t first = 0;
  std::int64_t last = 0;
};

// Rows of all batches: expert by expert, in an expert batch by batch, in a batch by token. Tokens: batch by batch.
class BatchPlan {
 public:
  explicit BatchPlan(const std::vector<Batch>& batches);
  BatchPlan(const BatchPlan&) = delete;
  BatchPlan& operator=(const BatchPlan&) = delete;

  std::int64_t tokens() const { return tokens_; }
  std::int64_t routes() const { return static_cast<std::int64_t>(row_token_.size()); }
  const std::int32_t* row_token() const { return row_token_.data(); }  // [routes] among the tokens of all
  std::int64_t first_token(std::size_t batch) const { return first_tokens_[batch]; }
  // The row among all of a batch's first row of an expert.
  int shared_row(std::size_t batch, int expert) const {
    return shared_begin_[batch * experts_ + static_cast<std::size_t>(expert)];
  }
  const std::vector<RowTask>& row_tasks() const { return row_tasks_; }
  const std::vector<BatchRows>& batch_rows() const { return batch_rows_; }
  const std::vector<TokenPiece>& token_pieces() const { return token_pieces_; }

 private:
  void place_rows(const std::vector<Batch>& batches);
  void cut_tasks(const std::vector<Batch>& batches);

  std::size_t experts_ = 0;
  std::int64_t tokens_ = 0;
  std::vector<std::int64_t> first_tokens_;
  std::vector<int> shared_begin_;  // [batches, experts]
  std::vector<std::int32_t> row_token_;
  std::vector<BatchRows> batch_rows_;
  std::vector<RowTask> row_tasks_;
  std::vector<TokenPiece> token_pieces_;
};

}  // namespace kt_expert
