// Loops that do nothing but what a kernel is bound by, to state a kernel's speed as a fraction of it.
#pragma once

#include <cstdint>

namespace kt_expert {
namespace {

constexpr int kBurnChains = 12;  // independent sums: more than latency times multipliers on every CPU so far

// `rounds` rounds of one multiply-add on each of kBurnChains sums; returns the flop done. V is an ISA's vector type.
template <typename V>
double burn_fma(std::int64_t rounds) {
  V sums[kBurnChains];
  for (V& sum : sums) sum = V::set(1.0f);
  const V factor = V::set(0.5f);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kBurnChains; ++i) sums[i] = V::fma(sums[i], factor, factor);
  }
  V total = sums[0];
  for (int i = 1; i < kBurnChains; ++i) total = total + sums[i];
  float lanes[V::kLanes];
  total.store(lanes);
  asm volatile("" : : "r"(lanes) : "memory");  // the sums are needed
  return 2.0 * kBurnChains * V::kLanes * static_cast<double>(rounds);
}

// Reads `count` floats, a multiple of 128.
template <typename V>
void read_floats(const float* source, std::int64_t count) {
  constexpr int kStreams = 8;
  V sums[kStreams];
  for (V& sum : sums) sum = V::set(0.0f);
  for (std::int64_t i = 0; i < count; i += kStreams * V::kLanes) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) sums[s] = sums[s] + V::load(source + i + s * V::kLanes);
  }
  V total = sums[0];
  for (int s = 1; s < kStreams; ++s) total = total + sums[s];
  float lanes[V::kLanes];
  total.store(lanes);
  asm volatile("" : : "r"(lanes) : "memory");
}

}  // namespace
}  // namespace kt_expert
