// The numerics contract and the promises of reproducibility, on every ISA.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "isas.h"
#include "kt_expert/error.h"
#include "layer_reference.h"

namespace kt_expert {
namespace {

// Relative L2 of the numerics contract with bf16 tokens, where one rounding costs about 1.7e-3.
constexpr double kBf16Bound = 3e-3;
// With fp32 tokens and fp32 arithmetic only the order of summation differs from double precision.
constexpr double kFp32Bound = 5e-6;
// Sums of several memory nodes against those of one.
constexpr double kNodesBound = 1e-5;
// Weights that bf16 does not hold, where an ISA multiplies bf16: their rounding is one more, see ARCHITECTURE.md. Of a
// batch: one token's gradients of routing weights are two numbers, whose error says little.
constexpr double kRoundedWeightsBound = 3.2e-3;
// Activations in eight bits: two roundings of 1/254 of a row's largest magnitude, which is three to four deviations.
constexpr double kIntegerBound = 3e-2;
// Of values without signs, whose sums grow where their roundings cancel.
constexpr double kUnsignedBound = 5e-3;

LayerSpec layer(int experts, int hidden, int intermediate, ActivationSpec activation = {}, bool bias = false) {
  LayerSpec spec;
  spec.experts = experts;
  spec.hidden = hidden;
  spec.intermediate = intermediate;
  spec.activation = activation;
  spec.has_bias = bias;
  return spec;
}

const AdapterSpec kSplit{false, 4, 3, 5, 2.0f, 1.5f, 0.5f};
const AdapterSpec kTied{true, 4, 4, 8, 2.0f, 2.0f, 1.0f};
const AdapterSpec kUngated{false, 0, 6, 2, 0.0f, 0.5f, 2.0f};
const AdapterSpec kDownOnly{false, 0, 0, 16, 0.0f, 0.0f, 1.0f};
const AdapterSpec kWide{true, 40, 40, 150, 0.2f, 0.2f, 0.1f};
const AdapterSpec kThin{false, 1, 1, 1, 2.0f, 2.0f, 2.0f};
const AdapterSpec kWidest{false, 256, 256, 256, 0.1f, 0.1f, 0.1f};

std::vector<LayerCase> cases() {
  return {
      {"tile-aligned", layer(4, 64, 32), kSplit, 40, 2},
      {"ragged", layer(5, 37, 29), kSplit, 23, 3},
      {"ragged-tied", layer(5, 37, 29), kTied, 23, 3},
      {"empty-experts", layer(8, 33, 17), kTied, 19, 2, WeightFormat::kBf16, 4},
      {"no-tokens", layer(4, 32, 16), kSplit, 0, 2},
      {"one-token", layer(6, 40, 24), kSplit, 1, 3},
      {"one-route", layer(2, 17, 5), kTied, 1, 1},
      {"many-rows", layer(2, 70, 45), kTied, 230, 1},
      {"gpt-oss", layer(4, 45, 30, {Activation::kGptOss, 1.702f, 1.0f}, true), kTied, 31, 2},
      {"clamped-silu", layer(4, 45, 30, {Activation::kClampedSilu, 1.0f, 0.8f}), kTied, 31, 2},
      {"gelu-tanh", layer(3, 40, 33, {Activation::kGeluTanh}, true), kSplit, 17, 2},
      {"relu2", layer(3, 40, 33, {Activation::kRelu2}, true), kUngated, 17, 2},
      {"down-only", layer(4, 48, 40), kDownOnly, 21, 2},
      {"wide-lora", layer(3, 48, 40), kWide, 21, 2},
      {"rank-1", layer(3, 37, 29), kThin, 11, 2},
      {"rank-256", layer(2, 37, 29), kWidest, 11, 2},
      {"no-adapter", layer(4, 48, 40), AdapterSpec{}, 21, 2},
  };
}

bool bf16_operands(Isa isa, FloatType type) {
  return type == FloatType::kBf16 && kernels_for(isa).operand == OperandType::kBf16;
}

// ISAs that round activations do so with int8 weights only, and AMX leaves fp32 tokens to AVX-512.
bool rounds(Isa isa, WeightFormat format, FloatType type = FloatType::kBf16) {
  return rounds_activations(isa) && format == WeightFormat::kInt8 &&
         (type == FloatType::kBf16 || isa == Isa::kAvx512Vnni);
}

// What a layer's pass shares with another emulated ISA, down to the kernels, takes minutes there and shows nothing
// new; product_test.cc runs every ISA with every format all the same.
bool runs_elsewhere(Isa isa, WeightFormat format, FloatType type) {
  if (!emulated()) return false;
  if (type == FloatType::kF32 && bf16_operands(isa, FloatType::kBf16)) return true;  // on AVX-512
  return rounds_activations(isa) && format != WeightFormat::kInt8;                   // on AVX-512, on AMX BF16
}

template <typename Body>
void for_each_isa(const Body& body) {
  for (Isa isa : tested_isas()) {
    CAPTURE(std::string(isa_name(isa)));
    body(isa);
  }
}

void check_contract(Isa isa, const LayerCase& spec, FloatType type) {
  Engine engine(2, isa_name(isa), 1);
  const LayerInputs inputs = make_inputs(spec, 11);
  const LayerResult got = run_engine(engine, inputs, type, SavePolicy::kActivations);
  const LayerResult expected = reference(inputs, load_weights(inputs, 1), bf16_operands(isa, type));
  const double bound = rounds(isa, spec.format, type) ? kIntegerBound
                       : type == FloatType::kBf16     ? kBf16Bound
                                                      : kFp32Bound;
  const WorstError worst = worst_error(got, expected);
  CAPTURE(worst.quantity);
  CHECK(worst.error <= bound);
  const bool rounds_weights = spec.format != WeightFormat::kBf16 && bf16_operands(isa, type);
  if (rounds_weights && !rounds(isa, spec.format, type) && spec.tokens > 1) {
    const WorstError of_weights = worst_error(got, reference(inputs, load_weights(inputs, 1), false));
    CAPTURE(of_weights.quantity);
    CHECK(of_weights.error <= kRoundedWeightsBound);
  }
}

TEST_CASE("output and every gradient meet the contract") {
  for_each_isa([](Isa isa) {
    for (const LayerCase& spec : cases()) {
      CAPTURE(spec.name);
      for (const FloatType type : {FloatType::kBf16, FloatType::kF32}) {
        if (runs_elsewhere(isa, spec.format, type)) continue;
        CAPTURE(static_cast<int>(type));
        check_contract(isa, spec, type);
      }
    }
  });
}

// The emulator takes signed bytes for unsigned.
bool signs_are_lost(Isa isa, WeightFormat format) { return emulated() && isa == Isa::kAmxInt8 && rounds(isa, format); }

TEST_CASE("every weight format meets the contract against its own weights") {
  for_each_isa([](Isa isa) {
    for (WeightFormat format : all_weight_formats()) {
      if (signs_are_lost(isa, format)) continue;
      CAPTURE(std::string(weight_format_name(format)));
      for (const int tokens : {1, 40}) {
        LayerCase spec{"format", layer(3, 150, 140), kSplit, tokens, 2, format};
        for (const FloatType type : {FloatType::kBf16, FloatType::kF32}) {
          if (runs_elsewhere(isa, format, type)) continue;
          CAPTURE(static_cast<int>(type));
          check_contract(isa, spec, type);
        }
      }
    }
  });
}

// Inputs without signs, which the emulator reads right: relu2 keeps h free of them.
TEST_CASE("layers with activations in eight bits are near their golden") {
  for_each_isa([](Isa isa) {
    if (!rounds_activations(isa)) return;
    LayerInputs inputs = make_inputs(
        {"unsigned", layer(3, 150, 140, {Activation::kRelu2}), AdapterSpec{}, 40, 2, WeightFormat::kInt8}, 16);
    for (auto& matrices : inputs.weights) {
      for (auto& matrix : matrices) {
        for (bf16_t& value : matrix) value = static_cast<bf16_t>(value & 0x7FFFu);
      }
    }
    for (float& value : inputs.x) value = std::fabs(value);
    Engine engine(2, isa_name(isa), 1);
    const LayerResult got = run_engine(engine, inputs, FloatType::kBf16, SavePolicy::kActivations);
    const WorstError worst =
        worst_error(got, reference(inputs, load_weights(inputs, 1), bf16_operands(isa, FloatType::kBf16)));
    CAPTURE(worst.quantity);
    CHECK(worst.error <= kUnsignedBound);
  });
}

TEST_CASE("every ISA drops the same values of LoRA's inputs") {
  AdapterSpec dropping = kSplit;
  dropping.dropout = 0.4f;
  const LayerInputs inputs = make_inputs({"dropout", layer(4, 70, 44), dropping, 40, 2}, 17);
  Engine scalar(2, "scalar", 1);
  const LayerResult expected = run_engine(scalar, inputs, FloatType::kBf16, SavePolicy::kActivations);
  const LayerResult kept = run_engine(scalar, make_inputs({"kept", layer(4, 70, 44), kSplit, 40, 2}, 17),
                                      FloatType::kBf16, SavePolicy::kActivations);
  CHECK(worst_error(kept, expected).error > 0.1);  // dropout shows
  for_each_isa([&](Isa isa) {
    Engine engine(2, isa_name(isa), 1);
    for (const SavePolicy policy : {SavePolicy::kActivations, SavePolicy::kInputs}) {
      const LayerResult got = run_engine(engine, inputs, FloatType::kBf16, policy);
      CHECK(worst_error(got, expected).error <= 2 * kBf16Bound);  // both round
    }
  });
}

TEST_CASE("threads, company and recomputation do not change a bit") {
  for_each_isa([](Isa isa) {
    for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kInt8, WeightFormat::kMxfp4}) {
      CAPTURE(std::string(weight_format_name(format)));
      for (const FloatType type : {FloatType::kBf16, FloatType::kF32}) {
        if (runs_elsewhere(isa, format, type)) continue;
        const LayerInputs inputs = make_inputs({"bits", layer(4, 70, 44), kTied, 47, 2, format}, 12);
        Engine one(1, isa_name(isa), 1), five(5, isa_name(isa), 1);
        const LayerResult expected = run_engine(one, inputs, type, SavePolicy::kActivations);
        CHECK(same_bits(run_engine(five, inputs, type, SavePolicy::kActivations), expected));
        CHECK(same_bits(run_engine(five, inputs, type, SavePolicy::kInputs), expected));
        const std::size_t width = static_cast<std::size_t>(inputs.spec.layer.hidden);
        for (const int first : {0, 1, 20}) {
          const int count = first == 20 ? 27 : first + 1;
          const LayerResult alone =
              run_engine(one, select_tokens(inputs, first, count), type, SavePolicy::kActivations);
          const auto begin = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(first) * width);
          CHECK(std::equal(alone.y.begin(), alone.y.end(), expected.y.begin() + begin));
          CHECK(std::equal(alone.dx.begin(), alone.dx.end(), expected.dx.begin() + begin));
          CHECK(std::equal(alone.d_weights.begin(), alone.d_weights.end(),
                           expected.d_weights.begin() + first * inputs.spec.top_k));
        }
      }
    }
  });
}

// Beyond one task of 192 rows, one block of 128 columns and one of few rows' 512, with pieces left over of each.
TEST_CASE("nor do they where there are several tasks of everything") {
  constexpr int kHidden = 520, kFirst = 195, kCount = 3;
  for_each_isa([](Isa isa) {
    for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kInt4G32}) {
      if (emulated() && format != WeightFormat::kBf16) continue;  // half a minute an ISA there
      if (runs_elsewhere(isa, format, FloatType::kBf16)) continue;
      CAPTURE(std::string(weight_format_name(format)));
      const LayerInputs inputs = make_inputs({"tasks", layer(2, kHidden, 140), kSplit, 200, 1, format, 1}, 18);
      Engine one(1, isa_name(isa), 1), three(3, isa_name(isa), 1);
      const LayerResult expected = run_engine(one, inputs, FloatType::kBf16, SavePolicy::kActivations);
      CHECK(same_bits(run_engine(three, inputs, FloatType::kBf16, SavePolicy::kInputs), expected));
      const LayerResult alone =
          run_engine(three, select_tokens(inputs, kFirst, kCount), FloatType::kBf16, SavePolicy::kActivations);
      CHECK(std::equal(alone.y.begin(), alone.y.end(), expected.y.begin() + kFirst * kHidden));
      CHECK(std::equal(alone.dx.begin(), alone.dx.end(), expected.dx.begin() + kFirst * kHidden));
    }
  });
}

// Batches of one layer that differ in everything else. One more has rows enough that its neighbours' lie in several
// tasks, and one uses each expert that it names twice for a token.
std::vector<LayerInputs> strangers(const LayerSpec& spec, WeightFormat format) {
  AdapterSpec dropping = kTied;
  dropping.dropout = 0.3f;
  const AdapterSpec none;
  std::vector<LayerInputs> batches;
  unsigned seed = 40;
  for (const auto& [lora, tokens] : std::vector<std::pair<AdapterSpec, int>>{
           {kSplit, 5}, {none, 1}, {dropping, 7}, {kDownOnly, 0}, {kWide, 33}, {kSplit, 2}}) {
    LayerInputs inputs = make_inputs({"together", spec, lora, tokens, 2, format}, seed++);
    if (!batches.empty()) {
      for (int p = 0; p < kProjections; ++p) {
        inputs.weights[p] = batches.front().weights[p];
        inputs.biases[p] = batches.front().biases[p];
      }
    }
    batches.push_back(std::move(inputs));
  }
  for (std::size_t slot = 0; slot < batches.back().ids.size(); ++slot) batches.back().ids[slot] = 1;
  return batches;
}

TEST_CASE("nor does another's batch in the same pass over the weights") {
  for_each_isa([](Isa isa) {
    for (const LayerSpec& spec : {layer(3, 40, 33), layer(3, 45, 30, {Activation::kGptOss, 1.702f, 1.0f}, true)}) {
      for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kInt8, WeightFormat::kInt4G32}) {
        for (const FloatType type : {FloatType::kBf16, FloatType::kF32}) {
          if (runs_elsewhere(isa, format, type)) continue;
          CAPTURE(std::string(weight_format_name(format)));
          const std::vector<LayerInputs> batches = strangers(spec, format);
          for (const int nodes : {1, 2}) {
            Engine engine(3, isa_name(isa), nodes);
            for (const SavePolicy policy : {SavePolicy::kActivations, SavePolicy::kInputs}) {
              const std::vector<LayerResult> together = run_together(engine, batches, type, policy);
              for (std::size_t b = 0; b < batches.size(); ++b) {
                CAPTURE(b);
                CHECK(same_bits(together[b], run_engine(engine, batches[b], type, policy)));
              }
            }
          }
        }
      }
    }
  });
}

TEST_CASE("many strangers' rows of one expert are cut into several tasks") {
  for_each_isa([](Isa isa) {
    std::vector<LayerInputs> batches;
    for (const int tokens : {150, 3, 130, 1}) {
      LayerInputs inputs = make_inputs({"long", layer(2, 70, 45), kTied, tokens, 1, WeightFormat::kBf16, 1}, 50);
      batches.push_back(std::move(inputs));
    }
    Engine engine(2, isa_name(isa), 1);
    const std::vector<LayerResult> together = run_together(engine, batches, FloatType::kBf16, SavePolicy::kActivations);
    for (std::size_t b = 0; b < batches.size(); ++b) {
      CAPTURE(b);
      LayerInputs own = batches[b];
      for (int p = 0; p < kProjections; ++p) own.weights[p] = batches.front().weights[p];
      CHECK(same_bits(together[b], run_engine(engine, own, FloatType::kBf16, SavePolicy::kActivations)));
    }
  });
}

TEST_CASE("batches that do not fit together are refused") {
  const LayerInputs inputs = make_inputs({"refused", layer(2, 40, 33), kSplit, 3, 1}, 60);
  Engine engine(1, "", 1);
  const LayerWeights weights = load_weights(inputs, 1), others = load_weights(inputs, 1);
  const AdapterTensors adapter = load_adapter(inputs);
  AdapterTensors gradients(inputs.spec.layer, inputs.spec.lora);
  std::vector<float> y(inputs.x.size()), dx(inputs.x.size()), d_weights(inputs.ids.size());
  ForwardArgs forward;
  forward.weights = &weights;
  forward.lora = &adapter;
  forward.x = {inputs.x.data(), FloatType::kF32};
  forward.y = {y.data(), FloatType::kF32};
  forward.save = SavePolicy::kActivations;
  forward.routing = build_routing({inputs.ids.data(), inputs.ids.size()},
                                  {inputs.route_weights.data(), inputs.route_weights.size()}, inputs.spec.tokens, 1, 2);
  const CancelToken token;
  std::vector<ForwardArgs> pair = {forward, forward};
  const auto refused = [&] {
    CHECK_THROWS_AS(engine.forward_together({pair.data(), pair.size()}), InvalidArgument);
    pair[1] = forward;
  };
  pair[1].weights = &others;
  refused();
  pair[1].token = &token;
  refused();
  pair[1].y.type = FloatType::kBf16;
  refused();
  CHECK(engine.forward_together({}).empty());
  const std::unique_ptr<Ticket> first = engine.forward(forward);
  forward.save = SavePolicy::kInputs;
  const std::unique_ptr<Ticket> other = engine.forward(forward);
  BackwardArgs backward;
  backward.weights = &weights;
  backward.lora = &adapter;
  backward.gradients = &gradients;
  backward.ticket = first.get();
  backward.dy = {inputs.dy.data(), FloatType::kF32};
  backward.dx = {dx.data(), FloatType::kF32};
  backward.d_weights = d_weights.data();
  std::vector<BackwardArgs> backwards = {backward, backward};
  CHECK_THROWS_AS(engine.backward_together({backwards.data(), backwards.size()}), InvalidArgument);  // one's gradients
  backwards[1].gradients = nullptr;
  backwards[1].ticket = other.get();
  CHECK_THROWS_AS(engine.backward_together({backwards.data(), backwards.size()}), InvalidArgument);  // policies
}

TEST_CASE("memory nodes agree, and each number of them with itself to the bit") {
  for_each_isa([](Isa isa) {
    for (WeightFormat format : all_weight_formats()) {
      if (runs_elsewhere(isa, format, FloatType::kF32)) continue;
      CAPTURE(std::string(weight_format_name(format)));
      const LayerInputs inputs = make_inputs({"nodes", layer(2, 24, 630), kSplit, 5, 2, format}, 13);
      Engine single(2, isa_name(isa), 1);
      const LayerResult expected = run_engine(single, inputs, FloatType::kF32, SavePolicy::kActivations);
      for (const int nodes : {2, 3, 5}) {
        CAPTURE(nodes);
        Engine split(3, isa_name(isa), nodes), again(7, isa_name(isa), nodes);
        const LayerResult got = run_engine(split, inputs, FloatType::kF32, SavePolicy::kActivations);
        CHECK(worst_error(got, expected).error <= kNodesBound);
        CHECK(same_bits(run_engine(again, inputs, FloatType::kF32, SavePolicy::kActivations), got));
      }
    }
  });
}

TEST_CASE("more nodes than slices of I still compute") {
  const LayerInputs inputs = make_inputs({"small", layer(3, 20, 10), kSplit, 9, 2}, 14);
  Engine engine(2, "scalar", 5);
  const LayerResult got = run_engine(engine, inputs, FloatType::kF32, SavePolicy::kActivations);
  CHECK(worst_error(got, reference(inputs, load_weights(inputs, 1), false)).error <= kFp32Bound);
}

TEST_CASE("masters hold what the weights decode to, and encode to the same bits") {
  for (const int nodes : {1, 3}) {
    CAPTURE(nodes);
    const LayerInputs inputs =
        make_inputs({"masters", layer(3, 70, 45, {Activation::kGptOss, 1.702f, 1.0f}, true), kTied, 4, 2}, 21);
    Engine engine(3, "scalar", nodes);
    const LayerWeights weights = load_weights(inputs, nodes);
    AdapterTensors masters(inputs.spec.layer, full_weights());
    engine.decode_weights(weights, masters);
    LayerWeights encoded(inputs.spec.layer, WeightFormat::kBf16, nodes);
    engine.encode_weights(masters, 0, 2, encoded);
    engine.encode_weights(masters, 2, 1, encoded);
    constexpr AdapterTensor kWeights[] = {AdapterTensor::kWGate, AdapterTensor::kWUp, AdapterTensor::kWDown};
    for (int p = 0; p < kProjections; ++p) {
      const Projection projection = static_cast<Projection>(p);
      for (int e = 0; e < inputs.spec.layer.experts; ++e) {
        const std::vector<float> values = weights.dequantized(projection, e);
        CHECK(values == encoded.dequantized(projection, e));
        CHECK(std::equal(values.begin(), values.end(), masters.expert(kWeights[p], e)));
        const Span<float> bias = encoded.bias(projection, e);
        CHECK(std::equal(bias.begin(), bias.end(), weights.bias(projection, e)));
      }
    }
    LayerWeights quantised(inputs.spec.layer, WeightFormat::kInt8, nodes);
    CHECK_THROWS_AS(engine.encode_weights(masters, 0, 3, quantised), InvalidArgument);
    CHECK_THROWS_AS(engine.encode_weights(masters, 2, 2, encoded), InvalidArgument);
    AdapterTensors lora(inputs.spec.layer, kTied);
    CHECK_THROWS_AS(engine.decode_weights(weights, lora), InvalidArgument);
  }
}

TEST_CASE("a step on weights is seen by the next pass, rounded once") {
  const LayerInputs inputs = make_inputs({"step", layer(3, 37, 29), AdapterSpec{}, 9, 2}, 22);
  Engine engine(2, "scalar", 1);
  LayerWeights weights = load_weights(inputs, 1);
  AdapterTensors masters(inputs.spec.layer, full_weights()), gradients(inputs.spec.layer, full_weights());
  engine.decode_weights(weights, masters);
  for (int t = kLoraTensors; t < kAdapterTensors; ++t) {
    AlignedBuffer<float>& tensor = gradients.tensor(static_cast<AdapterTensor>(t));
    std::fill_n(tensor.data(), tensor.size(), 1.0f);
  }
  OptimizerState state(inputs.spec.layer, full_weights(), OptimizerKind::kSgd, MomentType::kF32);
  LayerUpdate update;
  OptimizerUpdate sgd;
  sgd.kind = OptimizerKind::kSgd;
  sgd.learning_rate = 0.001;
  for (std::optional<TensorStep>& step : update.step.tensors) step = TensorStep{sgd, 1.0};
  update.gradients = {&gradients};
  update.parameters = &masters;
  update.state = &state;
  update.weights = &weights;
  const float before = masters.expert(AdapterTensor::kWDown, 1)[5];
  engine.step({update});
  const float after = masters.expert(AdapterTensor::kWDown, 1)[5];
  CHECK(after == doctest::Approx(before - 0.001f));
  CHECK(weights.dequantized(Projection::kDown, 1)[5] == bf16_to_float(float_to_bf16(after)));
}

TEST_CASE("tickets take the bytes announced") {
  const LayerInputs inputs = make_inputs({"size", layer(5, 37, 29), kTied, 23, 3}, 15);
  for (const SavePolicy policy : {SavePolicy::kActivations, SavePolicy::kInputs}) {
    const Routing routing = build_routing({inputs.ids.data(), inputs.ids.size()},
                                          {inputs.route_weights.data(), inputs.route_weights.size()}, 23, 3, 5);
    const Ticket ticket(inputs.spec.layer, kTied, routing, FloatType::kBf16, policy, {},
                        std::make_shared<TicketMemory>());
    CHECK(ticket.bytes() == Engine::ticket_bytes(inputs.spec.layer, kTied, 23, 3, FloatType::kBf16, policy));
  }
}

}  // namespace
}  // namespace kt_expert
