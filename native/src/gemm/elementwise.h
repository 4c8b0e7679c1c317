// Loops over contiguous floats, compiled once per instruction set: each kernel file includes this and is built with its
// own flags, so the compiler vectorises for that rung. Everything here has internal linkage on purpose.
#pragma once

#include <cstdint>

#include "gemm/optimizer_loops.h"

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

// Eight partial sums, then a fixed tree: the order does not depend on the compiler or on who calls.
float loop_dot(const float* left, const float* right, std::int64_t count) {
  constexpr int kLanes = 8;
  float partial[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) partial[lane] += left[i + lane] * right[i + lane];
  }
  for (int lane = 0; i < count; ++i, ++lane) partial[lane] += left[i] * right[i];
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

// Short runs in fp32, summed up in double: as exact as its inputs deserve, at twice the speed of double throughout.
double loop_sum_squares(const float* values, std::int64_t count) {
  constexpr int kLanes = 8;
  constexpr std::int64_t kRun = 16 * kLanes;
  double total = 0.0;
  std::int64_t first = 0;
  for (; first + kRun <= count; first += kRun) {
    float partial[kLanes] = {};
    for (int i = 0; i < kRun; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) partial[lane] += values[first + i + lane] * values[first + i + lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(partial[lane]);
  }
  for (; first < count; ++first) total += static_cast<double>(values[first]) * values[first];
  return total;
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
