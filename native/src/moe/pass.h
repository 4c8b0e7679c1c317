// What forward and backward share: column-block tasks over the active experts and LoRA products.
#pragma once

#include <algorithm>
#include <functional>

#include "gemm/kernels.h"
#include "kt_expert/engine.h"
#include "moe/arena.h"

namespace kt_expert {

constexpr int kTaskColumns = 128;  // one B block of the product, so a task expands its weights once
constexpr int kTaskRows = 64;      // rows of an elementwise task: long enough to hide the hand-out of tasks

inline std::int64_t blocks(std::int64_t extent, std::int64_t width) { return (extent + width - 1) / width; }

struct Columns {
  int first;
  int count;
};

// Runs body(expert, columns, worker) for every active expert and every block of `width` columns.
template <typename Body>
void for_each_expert_block(ThreadPool& pool, const Routing& routing, int width, const CancelToken* token, Body body) {
  const std::int64_t per_expert = blocks(width, kTaskColumns);
  pool.run(
      static_cast<std::int64_t>(routing.active.size()) * per_expert,
      [&](std::int64_t task, int worker) {
        const int expert = routing.active[static_cast<std::size_t>(task / per_expert)];
        const int first = static_cast<int>(task % per_expert) * kTaskColumns;
        body(expert, Columns{first, std::min(kTaskColumns, width - first)}, worker);
      },
      token);
}

// Runs body(expert, worker) for every active expert.
template <typename Body>
void for_each_expert(ThreadPool& pool, const Routing& routing, const CancelToken* token, Body body) {
  pool.run(
      static_cast<std::int64_t>(routing.active.size()),
      [&](std::int64_t task, int worker) { body(routing.active[static_cast<std::size_t>(task)], worker); }, token);
}

// Runs body(first, last, worker) over [0, count) in pieces of kTaskRows.
template <typename Body>
void for_each_rows(ThreadPool& pool, std::int64_t count, const CancelToken* token, Body body) {
  pool.run(
      blocks(count, kTaskRows),
      [&](std::int64_t task, int worker) {
        body(task * kTaskRows, std::min<std::int64_t>(count, (task + 1) * kTaskRows), worker);
      },
      token);
}

// fp32 view of [rows, width] tokens: the data itself, or a converted copy taken from the arena.
const float* as_f32(const KernelTable& kernels, ThreadPool& pool, const CancelToken* token, TokensIn in,
                    std::int64_t rows, std::int64_t width, float* copy);

// One output row per token: sum over its slots, in slot order, of weight * rows[slot_row], rounded once.
// `weighted` false adds the rows as they are.
void combine_routes(const KernelTable& kernels, ThreadPool& pool, const CancelToken* token, const Routing& routing,
                    const float* rows, int width, bool weighted, float* worker_rows, TokensOut out);

inline RightOperand bf16_operand(const bf16_t* data, std::int64_t stride, RightLayout layout) {
  RightOperand operand;
  operand.bf16 = data;
  operand.stride = stride;
  operand.layout = layout;
  return operand;
}

inline RightOperand f32_operand(const float* data, std::int64_t stride, RightLayout layout,
                                const std::int32_t* rows = nullptr) {
  RightOperand operand;
  operand.f32 = data;
  operand.stride = stride;
  operand.layout = layout;
  operand.rows = rows;
  return operand;
}

inline LeftOperand left_operand(const float* data, std::int64_t stride, const std::int32_t* rows = nullptr,
                                float scale = 1.0f, bool transposed = false) {
  LeftOperand operand;
  operand.base = data;
  operand.stride = stride;
  operand.rows = rows;
  operand.scale = scale;
  operand.transposed = transposed;
  return operand;
}

}  // namespace kt_expert
