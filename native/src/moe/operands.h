// Rows that products take: tokens, hidden values and LoRA intermediates, as operands of the ISA.
#pragma once

#include <algorithm>

#include "gemm/gemm.h"
#include "moe/arena.h"
#include "moe/tasks.h"

namespace kt_expert {

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
  // Routes from `first` on, whose tokens `row_token` gives.
  LeftRows of(std::int64_t first, const std::int32_t* row_token) const {
    if (gathered.data != nullptr) return gathered.from(first);
    return tokens.from(0, row_token + first);
  }
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

}  // namespace kt_expert
