// h = act(gate, up) and its derivatives, once for every vector width: V is an ISA's vector type.
#pragma once

#include <cstdint>
#include <limits>

#include "kt_expert/layer.h"

namespace kt_expert {
namespace {

// exp by range reduction to [-ln2/2, ln2/2] and a degree-6 Taylor polynomial: below 2 ulp over the finite range.
template <typename V>
V exp_of(V x) {
  x = V::max(V::min(V::set(88.02969f), x), V::set(-87.33654f));
  const V n = V::round(x * V::set(1.44269504088896341f));
  // ln 2 in two parts, the first with trailing zeros so that n times it is exact.
  V r = V::fnma(n, V::set(0.693359375f), x);
  r = V::fnma(n, V::set(-2.12194440e-4f), r);
  V p = V::set(1.0f / 720.0f);
  p = V::fma(p, r, V::set(1.0f / 120.0f));
  p = V::fma(p, r, V::set(1.0f / 24.0f));
  p = V::fma(p, r, V::set(1.0f / 6.0f));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  return p * V::power_of_two(n);
}

template <typename V>
V sigmoid_of(V x) {
  const V one = V::set(1.0f);
  return one / (one + exp_of(V::set(0.0f) - x));
}

template <typename V>
struct ActivationValue {
  V h, d_gate, d_up;  // the derivatives already times d_h
};

// gate * sigmoid(alpha * gate) * (up + offset), gate and up clamped first where the kind has a limit.
template <typename V, bool kClamp>
ActivationValue<V> swiglu(const ActivationSpec& spec, V gate, V up, V d_h) {
  const V limit = V::set(spec.limit), floor = V::set(-spec.limit), one = V::set(1.0f);
  V g = gate, u = up;
  if constexpr (kClamp) {
    // The value is the second operand: min and max return it where it is NaN, so NaN passes through as in torch.
    g = V::min(limit, gate);
    u = V::max(floor, V::min(limit, up));
  }
  const float offset = spec.kind == Activation::kGptOss ? 1.0f : 0.0f;
  u = u + V::set(offset);
  const V scaled = V::set(spec.alpha) * g;
  const V s = sigmoid_of(scaled);
  const V slope = s * V::fma(scaled, one - s, one);
  ActivationValue<V> value{g * s * u, d_h * u * slope, d_h * g * s};
  if constexpr (kClamp) {
    const V lowest = V::set(-std::numeric_limits<float>::infinity());
    value.d_gate = V::keep_within(lowest, gate, limit, value.d_gate);
    value.d_up = V::keep_within(floor, up, limit, value.d_up);
  }
  return value;
}

// Hendrycks & Gimpel, arXiv:1606.08415, the tanh form: 0.5 (1 + tanh z) = sigmoid(2 z).
template <typename V>
ActivationValue<V> gelu_tanh(V gate, V up, V d_h) {
  constexpr float kTwoRootTwoOverPi = 1.5957691216057308f, kCubic = 0.044715f;
  const V square = gate * gate, one = V::set(1.0f);
  const V z2 = V::set(kTwoRootTwoOverPi) * gate * V::fma(V::set(kCubic), square, one);
  const V s = sigmoid_of(z2);
  const V z2_slope = V::set(kTwoRootTwoOverPi) * V::fma(V::set(3.0f * kCubic), square, one);
  const V slope = V::fma(gate * s * (one - s), z2_slope, s);
  return {gate * s * up, d_h * up * slope, d_h * gate * s};
}

// relu(up)^2; there is no gate (So et al., arXiv:2109.08668).
template <typename V>
ActivationValue<V> relu_squared(V up, V d_h) {
  const V positive = V::max(V::set(0.0f), up);
  return {positive * positive, V::set(0.0f), V::set(2.0f) * d_h * positive};
}

template <typename V>
ActivationValue<V> evaluate(const ActivationSpec& spec, V gate, V up, V d_h) {
  switch (spec.kind) {
    case Activation::kGptOss:
    case Activation::kClampedSilu:
      return swiglu<V, true>(spec, gate, up, d_h);
    case Activation::kGeluTanh:
      return gelu_tanh(gate, up, d_h);
    case Activation::kRelu2:
      return relu_squared(up, d_h);
    case Activation::kSilu:
      break;
  }
  return swiglu<V, false>(spec, gate, up, d_h);
}

template <typename V>
void loop_activate(const ActivationSpec& spec, const float* gate, const float* up, float* h, std::int64_t count) {
  const V zero = V::set(0.0f);
  const bool gated = has_gate(spec.kind);
  std::int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) {
    evaluate(spec, gated ? V::load(gate + i) : zero, V::load(up + i), zero).h.store(h + i);
  }
  if (i == count) return;
  const std::int64_t rest = count - i;
  evaluate(spec, gated ? V::load_partial(gate + i, rest) : zero, V::load_partial(up + i, rest), zero)
      .h.store_partial(h + i, rest);
}

template <typename V>
void loop_activate_backward(const ActivationSpec& spec, const float* gate, const float* up, const float* d_h,
                            float* d_gate, float* d_up, std::int64_t count) {
  const V zero = V::set(0.0f);
  const bool gated = has_gate(spec.kind);
  std::int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) {
    const ActivationValue<V> value =
        evaluate(spec, gated ? V::load(gate + i) : zero, V::load(up + i), V::load(d_h + i));
    if (gated) value.d_gate.store(d_gate + i);
    value.d_up.store(d_up + i);
  }
  if (i == count) return;
  const std::int64_t rest = count - i;
  const ActivationValue<V> value = evaluate(spec, gated ? V::load_partial(gate + i, rest) : zero,
                                            V::load_partial(up + i, rest), V::load_partial(d_h + i, rest));
  if (gated) value.d_gate.store_partial(d_gate + i, rest);
  value.d_up.store_partial(d_up + i, rest);
}

}  // namespace
}  // namespace kt_expert
