// What a trainer sends becomes passes over a layer and optimizer steps. Whatever the numbers are, nothing may crash or
// be read outside its buffers, and what is refused or cancelled must leave gradients and parameters as they were.
#include "fuzz/requests_fuzz.h"

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kt_expert/engine.h"
#include "kt_expert/error.h"
#include "kt_expert/layer.h"
#include "kt_expert/routing.h"

namespace kt_expert {
namespace {

constexpr int kExperts = 3, kHidden = 20, kIntermediate = 9;
constexpr int kMostTokens = 6, kMostRoutes = 4, kMostRank = 18;

const LayerWeights& layer_weights() {
  static const LayerWeights weights = [] {
    LayerSpec spec;
    spec.experts = kExperts;
    spec.hidden = kHidden;
    spec.intermediate = kIntermediate;
    LayerWeights filled(spec, WeightFormat::kBf16, 1);
    std::vector<bf16_t> values(static_cast<std::size_t>(kHidden * kIntermediate));
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = float_to_bf16(0.01f * static_cast<float>(i % 37) - 0.2f);
    for (int expert = 0; expert < kExperts; ++expert) {
      for (const Projection projection : {Projection::kGate, Projection::kUp, Projection::kDown}) {
        filled.set_matrix(projection, expert, {values.data(), values.size()});
      }
    }
    return filled;
  }();
  return weights;
}

std::vector<std::uint8_t> copy_of(const AdapterTensors& tensors) {
  std::vector<std::uint8_t> copy;
  for (int i = 0; i < kAdapterTensors; ++i) {
    const AlignedBuffer<float>& tensor = tensors.tensor(static_cast<AdapterTensor>(i));
    const std::uint8_t* bytes = reinterpret_cast<const std::uint8_t*>(tensor.data());
    copy.insert(copy.end(), bytes, bytes + tensor.size() * sizeof(float));
  }
  return copy;
}

void fill(Bytes& bytes, AdapterTensors& tensors) {
  for (int i = 0; i < kAdapterTensors; ++i) {
    AlignedBuffer<float>& tensor = tensors.tensor(static_cast<AdapterTensor>(i));
    for (std::size_t at = 0; at < tensor.size(); ++at) tensor.data()[at] = bytes.likely_float();
  }
}

// Tokens [tokens, H] in one of the two types.
class Tokens {
 public:
  Tokens(Bytes& bytes, int tokens, FloatType type) : type_(type), memory_(size_of(tokens, type)) {
    const int values = tokens * kHidden;
    for (int i = 0; i < values; ++i) {
      const float value = bytes.likely_float();
      if (type == FloatType::kF32) {
        std::memcpy(memory_.data() + i * sizeof value, &value, sizeof value);
      } else {
        const bf16_t rounded = float_to_bf16(value);
        std::memcpy(memory_.data() + i * sizeof rounded, &rounded, sizeof rounded);
      }
    }
  }
  Tokens(int tokens, FloatType type) : type_(type), memory_(size_of(tokens, type)) {}
  TokensIn in() const { return {memory_.data(), type_}; }
  TokensOut out() { return {memory_.data(), type_}; }
  bool operator==(const Tokens& other) const { return memory_ == other.memory_; }

 private:
  static std::size_t size_of(int tokens, FloatType type) {
    return static_cast<std::size_t>(tokens * kHidden * kt_expert::size_of(type));
  }
  FloatType type_;
  std::vector<std::uint8_t> memory_;
};

class Trainer {
 public:
  Trainer(Engine& engine, Bytes& bytes, const AdapterSpec& lora)
      : engine_(engine),
        bytes_(bytes),
        parameters_(layer_weights().spec(), lora),
        gradients_(layer_weights().spec(), lora),
        weight_gradients_(layer_weights().spec(), full_weights()) {
    fill(bytes, parameters_);
    gradients_.zero();
    weight_gradients_.zero();
  }

  void forward() {
    const int tokens = bytes_.next() % kMostTokens, top_k = 1 + bytes_.next() % kMostRoutes;
    type_ = bytes_.next() % 2 == 0 ? FloatType::kF32 : FloatType::kBf16;
    std::vector<std::int32_t> ids;
    std::vector<float> weights;
    for (int route = 0; route < tokens * top_k; ++route) {
      ids.push_back(bytes_.next() % 16 == 0 ? static_cast<std::int8_t>(bytes_.next()) : bytes_.next() % (kExperts + 1));
      weights.push_back(bytes_.likely_float());
    }
    const Tokens x(bytes_, tokens, type_);
    Tokens y(tokens, type_);
    ForwardArgs args;
    args.weights = &layer_weights();
    args.lora = bytes_.next() % 4 == 0 ? nullptr : &parameters_;
    args.x = x.in();
    args.routing = build_routing({ids.data(), ids.size()}, {weights.data(), weights.size()}, tokens, top_k, kExperts);
    args.y = y.out();
    args.save = static_cast<SavePolicy>(bytes_.next() % 3);
    const CancelToken token(bytes_.next() % 8 == 0 ? bytes_.any_float() : 60.0);
    args.token = &token;
    args.dropout = {bytes_.next(), bytes_.next()};
    if (bytes_.next() % 4 == 0)
      args.scales = AdapterScales{bytes_.likely_float(), bytes_.likely_float(), bytes_.likely_float()};
    uses_adapter_ = args.lora != nullptr;
    if (bytes_.next() % 2 == 0) {
      Tokens beside(tokens, type_);
      forward_beside_another(args, beside);
      ticket_ = engine_.forward(args);
      require(beside == y);
    } else {
      ticket_ = engine_.forward(args);
    }
  }

  // The same batch in one pass with the base model's own answer to it.
  void forward_beside_another(const ForwardArgs& args, Tokens& y) {
    Tokens other(args.routing.tokens, type_);
    ForwardArgs batches[2] = {args, args};
    batches[0].y = y.out();
    batches[0].token = nullptr;
    batches[1].lora = nullptr;
    batches[1].scales.reset();
    batches[1].y = other.out();
    batches[1].token = nullptr;
    if (bytes_.next() % 2 == 0) std::swap(batches[0], batches[1]);
    engine_.forward_together({batches, 2});
  }

  void backward() {
    if (ticket_ == nullptr) return;
    const std::vector<std::uint8_t> before = copy_of(gradients_), weights_before = copy_of(weight_gradients_);
    const int tokens = ticket_->routing().tokens;
    const FloatType type = bytes_.next() % 8 == 0 ? FloatType::kF32 : type_;
    const Tokens dy(bytes_, tokens, type);
    Tokens dx(tokens, type);
    std::vector<float> d_weights(static_cast<std::size_t>(tokens * ticket_->routing().top_k));
    CancelToken token;
    if (bytes_.next() % 8 == 0) token.cancel();
    BackwardArgs args;
    args.weights = &layer_weights();
    args.lora = uses_adapter_ ? &parameters_ : nullptr;
    args.gradients = uses_adapter_ ? &gradients_ : nullptr;
    args.weight_gradients = bytes_.next() % 4 == 0 ? &weight_gradients_ : nullptr;
    args.wanted = bytes_.next() % 2 == 0 ? kAllAdapterTensors : bytes_.next() & kAllAdapterTensors;
    args.replaced = bytes_.next() & kAllAdapterTensors;
    args.ticket = ticket_.get();
    args.dy = dy.in();
    args.dx = dx.out();
    args.d_weights = d_weights.data();
    args.token = &token;
    try {
      engine_.backward(args);
      require(!token.fired());  // what was cancelled before it began has not counted
    } catch (const Error&) {
      require(copy_of(gradients_) == before && copy_of(weight_gradients_) == weights_before);
    }
  }

  void step() {
    const std::vector<std::uint8_t> before = copy_of(parameters_);
    const OptimizerKind kind = static_cast<OptimizerKind>(bytes_.next() % 4);
    OptimizerState state(layer_weights().spec(), parameters_.spec(), kind,
                         static_cast<MomentType>(bytes_.next() % kMomentTypes));
    LayerUpdate layer;
    for (std::optional<TensorStep>& step : layer.step.tensors) {
      if (bytes_.next() % 8 == 0) continue;
      step.emplace();
      step->grad_scale = bytes_.likely_float();
      OptimizerUpdate& update = step->update;
      update.kind = bytes_.next() % 64 == 0 ? OptimizerKind::kSgd : kind;
      update.learning_rate = bytes_.next() % 64 == 0 ? bytes_.any_float() : 0.01;
      update.weight_decay = bytes_.next() % 64 == 0 ? bytes_.any_float() : 0.0;
      update.momentum = bytes_.next() % 64 == 0 ? bytes_.any_float() : 0.5;
    }
    layer.gradients = {&gradients_};
    layer.parameters = &parameters_;
    layer.state = &state;
    try {
      engine_.step({layer});
    } catch (const Error&) {
      require(copy_of(parameters_) == before);
    }
  }

 private:
  Engine& engine_;
  Bytes& bytes_;
  AdapterTensors parameters_, gradients_, weight_gradients_;
  FloatType type_ = FloatType::kF32;
  bool uses_adapter_ = false;
  std::unique_ptr<Ticket> ticket_;
};

AdapterSpec lora_spec(Bytes& bytes) {
  AdapterSpec lora;
  lora.tied = bytes.next() % 2 == 0;
  lora.rank_gate = bytes.next() % 8 == 0 ? static_cast<std::int8_t>(bytes.next()) : bytes.next() % kMostRank;
  lora.rank_up = lora.tied && bytes.next() % 16 != 0 ? lora.rank_gate : bytes.next() % kMostRank;
  lora.rank_down = bytes.next() % kMostRank;
  for (float* scale : {&lora.scale_gate, &lora.scale_up, &lora.scale_down}) {
    *scale = bytes.next() % 32 == 0 ? bytes.any_float() : 0.5f;
  }
  lora.dropout = bytes.next() % 32 == 0 ? bytes.any_float() : 0.25f * static_cast<float>(bytes.next() % 2);
  return lora;
}

}  // namespace

void check_requests(Bytes& bytes) {
  static Engine engine(1, "", 1);
  try {
    const AdapterSpec lora = lora_spec(bytes);
    lora.validate();
    Trainer trainer(engine, bytes, lora);
    trainer.forward();
    const int backwards = bytes.next() % 3;
    for (int i = 0; i < backwards; ++i) trainer.backward();
    if (bytes.next() % 2 == 0) trainer.step();
  } catch (const Error&) {
    return;
  }
}

}  // namespace kt_expert
