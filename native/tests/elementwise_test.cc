// Activations, their derivatives and conversions of every ISA against double precision.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

#include "isas.h"
#include "kt_expert/error.h"

namespace kt_expert {
namespace {

double sigmoid(double value) { return 1.0 / (1.0 + std::exp(-value)); }

double reference_h(const ActivationSpec& spec, double gate, double up) {
  switch (spec.kind) {
    case Activation::kRelu2:
      return up > 0.0 ? up * up : 0.0;
    case Activation::kGeluTanh:
      return 0.5 * gate * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
    case Activation::kGptOss:
    case Activation::kClampedSilu:
      gate = std::fmin(gate, spec.limit);
      up = std::fmax(std::fmin(up, spec.limit), -spec.limit) + (spec.kind == Activation::kGptOss ? 1.0 : 0.0);
      break;
    case Activation::kSilu:
      break;
  }
  return gate * sigmoid(spec.alpha * gate) * up;
}

const ActivationSpec kSpecs[] = {{Activation::kSilu, 1.0f, 0.0f},
                                 {Activation::kGptOss, 1.702f, 1.5f},
                                 {Activation::kGeluTanh, 1.0f, 0.0f},
                                 {Activation::kRelu2, 1.0f, 0.0f},
                                 {Activation::kClampedSilu, 1.0f, 0.75f}};

// Where the function has a corner a difference quotient means nothing.
bool at_corner(const ActivationSpec& spec, double gate, double up) {
  constexpr double kNear = 1e-3;
  if (spec.kind == Activation::kRelu2) return std::fabs(up) < kNear;
  return has_limit(spec.kind) &&
         (std::fabs(std::fabs(up) - spec.limit) < kNear || std::fabs(gate - spec.limit) < kNear);
}

TEST_CASE("activations and their derivatives") {
  for_each_rung([](const KernelTable& kernels) {
    for (const ActivationSpec& spec : kSpecs) {
      CAPTURE(static_cast<int>(spec.kind));
      for (const std::int64_t count : {1, 7, 8, 9, 15, 16, 17, 64, 101}) {
        Values values;
        std::vector<float> gate = values.floats(count), up = values.floats(count), d_h = values.floats(count);
        if (count > 8) {  // far tails, where a careless exp overflows
          gate[0] = -200.0f;
          gate[1] = 200.0f;
          gate[2] = -88.0f;
        }
        std::vector<float> h(gate.size()), d_gate(gate.size(), 0.0f), d_up(gate.size());
        kernels.activate(spec, gate.data(), up.data(), h.data(), count);
        kernels.activate_backward(spec, gate.data(), up.data(), d_h.data(), d_gate.data(), d_up.data(), count);
        for (std::size_t i = 0; i < gate.size(); ++i) {
          const double step = 1e-5;
          CHECK(h[i] == doctest::Approx(reference_h(spec, gate[i], up[i])).epsilon(1e-6).scale(1e-6));
          if (at_corner(spec, gate[i], up[i])) continue;
          const double slope_gate =
              (reference_h(spec, gate[i] + step, up[i]) - reference_h(spec, gate[i] - step, up[i])) / (2 * step);
          const double slope_up =
              (reference_h(spec, gate[i], up[i] + step) - reference_h(spec, gate[i], up[i] - step)) / (2 * step);
          CHECK(d_gate[i] == doctest::Approx(d_h[i] * slope_gate).epsilon(1e-4).scale(1e-3));
          CHECK(d_up[i] == doctest::Approx(d_h[i] * slope_up).epsilon(1e-4).scale(1e-3));
        }
      }
    }
  });
}

TEST_CASE("an activation without a gate does not read one") {
  for_each_rung([](const KernelTable& kernels) {
    const ActivationSpec spec{Activation::kRelu2, 1.0f, 0.0f};
    const std::vector<float> up(19, 2.0f), d_h(19, 1.0f);
    std::vector<float> h(19), d_up(19);
    kernels.activate(spec, nullptr, up.data(), h.data(), 19);
    kernels.activate_backward(spec, nullptr, up.data(), d_h.data(), nullptr, d_up.data(), 19);
    CHECK(h == std::vector<float>(19, 4.0f));
    CHECK(d_up == std::vector<float>(19, 4.0f));
  });
}

TEST_CASE("NaN passes through the clamps") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for_each_rung([&](const KernelTable& kernels) {
    for (const ActivationSpec& spec : kSpecs) {
      CAPTURE(static_cast<int>(spec.kind));
      const float gate[] = {nan, 1.0f}, up[] = {1.0f, nan};
      float h[2];
      kernels.activate(spec, gate, up, h, 2);
      CHECK((std::isnan(h[0]) || !has_gate(spec.kind)));
      CHECK(std::isnan(h[1]));
    }
  });
}

TEST_CASE("conversions round to nearest even and keep NaN") {
  const float special[] = {0.0f,
                           -0.0f,
                           1.0f,
                           1.00390625f,
                           1.01171875f,
                           3.4e38f,
                           std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN()};
  for_each_rung([&](const KernelTable& kernels) {
    Values values;
    std::vector<float> source = values.floats(77);
    source.insert(source.end(), std::begin(special), std::end(special));
    const std::int64_t count = static_cast<std::int64_t>(source.size());
    std::vector<bf16_t> bits(source.size());
    std::vector<float> back(source.size());
    kernels.f32_to_bf16(source.data(), bits.data(), count);
    kernels.bf16_to_f32(bits.data(), back.data(), count);
    for (std::size_t i = 0; i < source.size(); ++i) {
      if (std::isnan(source[i])) {
        CHECK(std::isnan(back[i]));
      } else {
        CHECK(bits[i] == float_to_bf16(source[i]));
        CHECK(back[i] == bf16_to_float(bits[i]));
      }
    }
  });
}

TEST_CASE("the scalar ISA is always there and a missing ISA is an error") {
  CHECK(kernels_for(Isa::kScalar).tile_rows > 0);
  CHECK_THROWS_WITH_AS(choose_isa("sse9"), doctest::Contains("choose one of: scalar, avx2"), InvalidArgument);
}

}  // namespace
}  // namespace kt_expert
