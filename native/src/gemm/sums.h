// Sums whose order depends neither on the compiler nor on who asks, compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kt_expert {
namespace {

constexpr int kSumLanes = 8;

// A fixed tree over partial sums.
inline float sum_lanes(const float (&partial)[kSumLanes]) {
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

// Of value_at(0) ... value_at(count - 1): short runs in fp32, summed up in double. As exact as its inputs deserve, at
// twice the speed of double throughout.
template <typename ValueAt>
double sum_squares_of(std::int64_t count, const ValueAt& value_at) {
  constexpr std::int64_t kRun = 16 * kSumLanes;
  double total = 0.0;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t end = std::min(i + kRun, count);
    float partial[kSumLanes] = {};
    for (; i + kSumLanes <= end; i += kSumLanes) {
      for (int lane = 0; lane < kSumLanes; ++lane) {
        const float value = value_at(i + lane);
        partial[lane] += value * value;
      }
    }
    for (int lane = 0; i < end; ++i, ++lane) {
      const float value = value_at(i);
      partial[lane] += value * value;
    }
    total += static_cast<double>(sum_lanes(partial));
  }
  return total;
}

}  // namespace
}  // namespace kt_expert
