// Loops over contiguous floats, compiled once per instruction set: each kernel file includes this and is built with its
// own flags, so the compiler vectorises for that ISA. Everything here has internal linkage on purpose.
#pragma once

#include <cstdint>

#include "gemm/optimizer_loops.h"
#include "gemm/sums.h"

namespace kt_expert {
namespace {

void loop_bf16_to_f32(const bf16_t* source, float* target, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) target[i] = bf16_to_float(source[i]);
}

void loop_f32_to_bf16(const float* source, bf16_t* target, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) target[i] = float_to_bf16(source[i]);
}

void loop_scale(float factor, float* target, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) target[i] *= factor;
}

void loop_add_scaled(float factor, const float* source, float* target, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) target[i] += factor * source[i];
}

float loop_dot(const float* left, const float* right, std::int64_t count) {
  float partial[kSumLanes] = {};
  std::int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int lane = 0; lane < kSumLanes; ++lane) partial[lane] += left[i + lane] * right[i + lane];
  }
  for (int lane = 0; i < count; ++i, ++lane) partial[lane] += left[i] * right[i];
  return sum_lanes(partial);
}

double loop_sum_squares(const float* values, std::int64_t count) {
  return sum_squares_of(count, [&](std::int64_t i) { return values[i]; });
}

void set_float_loops(KernelTable& table) {
  table.bf16_to_f32 = loop_bf16_to_f32;
  table.f32_to_bf16 = loop_f32_to_bf16;
  table.scale = loop_scale;
  table.add_scaled = loop_add_scaled;
  table.dot = loop_dot;
  table.sum_squares = loop_sum_squares;
  set_optimizer_loops(table);
}

}  // namespace
}  // namespace kt_expert
