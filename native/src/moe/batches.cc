#include "moe/batches.h"

#include <algorithm>

#include "moe/tasks.h"

namespace kt_expert {

std::vector<BatchSize> sizes_of(const std::vector<Batch>& batches) {
  std::vector<BatchSize> sizes;
  for (const Batch& batch : batches) sizes.push_back({batch.lora, batch.routing->tokens, batch.routing->routes});
  return sizes;
}

BatchSize sum_of(const std::vector<BatchSize>& batches) {
  BatchSize all;
  for (const BatchSize& batch : batches) {
    all.tokens += batch.tokens;
    all.routes += batch.routes;
  }
  return all;
}

BatchPlan::BatchPlan(const std::vector<Batch>& batches) {
  experts_ = batches.front().routing->expert_begin.size() - 1;
  for (std::size_t b = 0; b < batches.size(); ++b) {
    const std::int64_t tokens = batches[b].routing->tokens;
    first_tokens_.push_back(tokens_);
    tokens_ += tokens;
    for (std::int64_t first = 0; first < tokens; first += kPieceRows) {
      token_pieces_.push_back({b, first, std::min<std::int64_t>(tokens, first + kPieceRows)});
    }
  }
  place_rows(batches);
  cut_tasks(batches);
}

void BatchPlan::place_rows(const std::vector<Batch>& batches) {
  shared_begin_.resize(batches.size() * experts_);
  std::size_t routes = 0;
  for (const Batch& batch : batches) routes += static_cast<std::size_t>(batch.routing->routes);
  row_token_.reserve(routes);
  for (std::size_t expert = 0; expert < experts_; ++expert) {
    for (std::size_t b = 0; b < batches.size(); ++b) {
      const Routing& routing = *batches[b].routing;
      shared_begin_[b * experts_ + expert] = static_cast<int>(row_token_.size());
      const int begin = routing.begin_of(static_cast<int>(expert));
      for (int row = begin; row < begin + routing.rows_of(static_cast<int>(expert)); ++row) {
        row_token_.push_back(routing.row_token[static_cast<std::size_t>(row)] +
                             static_cast<std::int32_t>(first_tokens_[b]));
      }
    }
  }
}

void BatchPlan::cut_tasks(const std::vector<Batch>& batches) {
  std::vector<std::size_t> begins;  // of each task, in batch_rows_: it may still move
  for (int expert = 0; expert < static_cast<int>(experts_); ++expert) {
    const int begin = shared_row(0, expert);
    const int end = shared_row(batches.size() - 1, expert) + batches.back().routing->rows_of(expert);
    for_each_tile(end - begin, kTaskRows, [&](int first, int count) {
      begins.push_back(batch_rows_.size());
      row_tasks_.push_back({expert, begin + first, count, {}});
      for (std::size_t b = 0; b < batches.size(); ++b) {
        const Routing& routing = *batches[b].routing;
        const int own = shared_row(b, expert), shared = std::max(own, begin + first);
        const int rows = std::min(own + routing.rows_of(expert), begin + first + count) - shared;
        if (rows <= 0) continue;
        batch_rows_.push_back({b, expert, routing.begin_of(expert) + shared - own, shared, rows});
      }
    });
  }
  begins.push_back(batch_rows_.size());
  for (std::size_t task = 0; task < row_tasks_.size(); ++task) {
    row_tasks_[task].batches = {batch_rows_.data() + begins[task], begins[task + 1] - begins[task]};
  }
}

}  // namespace kt_expert
