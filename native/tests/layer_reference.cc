#include "layer_reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isas.h"

namespace kt_expert {
namespace {

// out[m] = sum over n of matrix[m, n] in[n], or with `transposed` out[n] = sum over m of matrix[m, n] in[m].
Matrix apply(const Matrix& matrix, const Matrix& in, std::size_t rows, bool transposed) {
  if (rows == 0) return {};
  const std::size_t columns = matrix.size() / rows;
  Matrix out(transposed ? columns : rows, 0.0);
  for (std::size_t m = 0; m < rows; ++m) {
    for (std::size_t n = 0; n < columns; ++n) {
      if (transposed) {
        out[n] += matrix[m * columns + n] * in[m];
      } else {
        out[m] += matrix[m * columns + n] * in[n];
      }
    }
  }
  return out;
}

void add(Matrix& target, const Matrix& values, double factor = 1.0) {
  for (std::size_t i = 0; i < values.size(); ++i) target[i] += factor * values[i];
}

void add_outer(double* target, const Matrix& left, const Matrix& right, double factor) {
  for (std::size_t m = 0; m < left.size(); ++m) {
    for (std::size_t n = 0; n < right.size(); ++n) target[m * right.size() + n] += factor * left[m] * right[n];
  }
}

struct Slopes {
  double h, gate, up;
};

Slopes activate(const ActivationSpec& spec, double gate, double up) {
  if (spec.kind == Activation::kRelu2) {
    const double positive = std::max(up, 0.0);
    return {positive * positive, 0.0, 2.0 * positive};
  }
  if (spec.kind == Activation::kGeluTanh) {
    const double root = std::sqrt(2.0 / M_PI), t = std::tanh(root * (gate + 0.044715 * gate * gate * gate));
    const double slope = 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * root * (1.0 + 3.0 * 0.044715 * gate * gate);
    return {0.5 * gate * (1.0 + t) * up, slope * up, 0.5 * gate * (1.0 + t)};
  }
  double gate_in = 1.0, up_in = 1.0;
  if (has_limit(spec.kind)) {
    gate_in = gate <= spec.limit ? 1.0 : 0.0;
    up_in = std::fabs(up) <= spec.limit ? 1.0 : 0.0;
    gate = std::min(gate, static_cast<double>(spec.limit));
    up = std::clamp(up, -static_cast<double>(spec.limit), static_cast<double>(spec.limit));
  }
  if (spec.kind == Activation::kGptOss) up += 1.0;
  const double s = 1.0 / (1.0 + std::exp(-spec.alpha * gate));
  return {gate * s * up, gate_in * up * s * (1.0 + spec.alpha * gate * (1.0 - s)), up_in * gate * s};
}

// One expert's dense matrices and the rows it is given.
class ExpertReference {
 public:
  ExpertReference(const LayerInputs& inputs, const LayerWeights& weights, bool bf16_operands, int expert)
      : in_(inputs), layer_(inputs.spec.layer), lora_(inputs.spec.lora), expert_(expert) {
    for (int p = 0; p < kProjections; ++p) {
      const Projection projection = static_cast<Projection>(p);
      if (projection == Projection::kGate && !has_gate(layer_.activation.kind)) continue;
      for (const float value : weights.dequantized(projection, expert)) {
        base_[p].push_back(bf16_operands ? bf16_to_float(float_to_bf16(value)) : value);
      }
    }
    for (int t = 0; t < kLoraTensors; ++t) {
      const TensorShape shape = tensor_shape(layer_, lora_, static_cast<AdapterTensor>(t));
      const std::size_t size = static_cast<std::size_t>(shape.rows * shape.columns);
      const auto first = in_.adapter[t].begin() + static_cast<std::ptrdiff_t>(size) * expert;
      lora_tensors_[t].assign(first, first + static_cast<std::ptrdiff_t>(size));
    }
  }

  void route(std::size_t token, std::size_t slot, LayerResult& result) const {
    const std::size_t hidden = static_cast<std::size_t>(layer_.hidden),
                      inter = static_cast<std::size_t>(layer_.intermediate);
    const double weight = in_.route_weights[slot];
    const Matrix x(in_.x.begin() + static_cast<std::ptrdiff_t>(token * hidden),
                   in_.x.begin() + static_cast<std::ptrdiff_t>((token + 1) * hidden));
    const Matrix dy(in_.dy.begin() + static_cast<std::ptrdiff_t>(token * hidden),
                    in_.dy.begin() + static_cast<std::ptrdiff_t>((token + 1) * hidden));
    const AdapterTensor a_up = lora_.tied ? AdapterTensor::kAGate : AdapterTensor::kAUp;
    const Adapted gate{Projection::kGate, AdapterTensor::kAGate, AdapterTensor::kBGate, lora_.rank_gate,
                       lora_.scale_gate};
    const Adapted up{Projection::kUp, a_up, AdapterTensor::kBUp, lora_.rank_up, lora_.scale_up};
    const Adapted down{Projection::kDown, AdapterTensor::kADown, AdapterTensor::kBDown, lora_.rank_down,
                       lora_.scale_down};
    const bool gated = has_gate(layer_.activation.kind);
    const Matrix g = gated ? project(gate, x) : Matrix(inter, 0.0), u = project(up, x);
    Matrix h(inter), slope_g(inter), slope_u(inter);
    for (std::size_t i = 0; i < inter; ++i) {
      const Slopes slopes = activate(layer_.activation, g[i], u[i]);
      h[i] = slopes.h, slope_g[i] = slopes.gate, slope_u[i] = slopes.up;
    }
    const Matrix out = project(down, h);
    for (std::size_t j = 0; j < hidden; ++j) {
      result.y[token * hidden + j] += weight * out[j];
      result.d_weights[slot] += out[j] * dy[j];
    }
    Matrix d_out = dy;
    for (double& value : d_out) value *= weight;
    const Matrix d_h = unproject(down, h, d_out, result);
    Matrix d_g(inter), d_u(inter);
    for (std::size_t i = 0; i < inter; ++i) d_g[i] = d_h[i] * slope_g[i], d_u[i] = d_h[i] * slope_u[i];
    Matrix d_x = unproject(up, x, d_u, result);
    if (gated) add(d_x, unproject(gate, x, d_g, result));
    for (std::size_t j = 0; j < hidden; ++j) result.dx[token * hidden + j] += d_x[j];
  }

 private:
  struct Adapted {
    Projection projection;
    AdapterTensor a, b;
    int rank;
    double scale;
  };
  std::size_t rows(Projection projection) const {
    return static_cast<std::size_t>(projection == Projection::kDown ? layer_.hidden : layer_.intermediate);
  }
  const Matrix& lora(AdapterTensor tensor) const { return lora_tensors_[static_cast<int>(tensor)]; }

  Matrix project(const Adapted& p, const Matrix& in) const {
    Matrix out = apply(base_[static_cast<int>(p.projection)], in, rows(p.projection), false);
    if (layer_.has_bias) {
      const std::vector<float>& bias = in_.biases[static_cast<int>(p.projection)];
      for (std::size_t i = 0; i < out.size(); ++i) out[i] += bias[static_cast<std::size_t>(expert_) * out.size() + i];
    }
    if (p.rank == 0) return out;
    const std::size_t rank = static_cast<std::size_t>(p.rank);
    add(out, apply(lora(p.b), apply(lora(p.a), in, rank, false), out.size(), false), p.scale);
    return out;
  }

  // Gradient of `in`; adds the projection's gradients.
  Matrix unproject(const Adapted& p, const Matrix& in, const Matrix& d_out, LayerResult& result) const {
    Matrix d_in = apply(base_[static_cast<int>(p.projection)], d_out, rows(p.projection), true);
    add_outer(weight_gradient(result, AdapterTensor::kWGate, p.projection, d_out.size() * in.size()), d_out, in, 1.0);
    if (layer_.has_bias) {
      add_outer(weight_gradient(result, AdapterTensor::kBiasGate, p.projection, d_out.size()), d_out, {1.0}, 1.0);
    }
    if (p.rank == 0) return d_in;
    const std::size_t rank = static_cast<std::size_t>(p.rank);
    const Matrix d_out_b = apply(lora(p.b), d_out, d_out.size(), true), in_a = apply(lora(p.a), in, rank, false);
    add(d_in, apply(lora(p.a), d_out_b, rank, true), p.scale);
    add_outer(gradient(result, p.a), d_out_b, in, p.scale);
    add_outer(gradient(result, p.b), d_out, in_a, p.scale);
    return d_in;
  }
  // `gate` is the tensor of that kind of the gate projection, after which those of up and down come.
  double* weight_gradient(LayerResult& result, AdapterTensor gate, Projection projection, std::size_t size) const {
    const int tensor = static_cast<int>(gate) + static_cast<int>(projection);
    return result.gradients[tensor].data() + size * static_cast<std::size_t>(expert_);
  }
  double* gradient(LayerResult& result, AdapterTensor tensor) const {
    return result.gradients[static_cast<int>(tensor)].data() + lora(tensor).size() * static_cast<std::size_t>(expert_);
  }

  const LayerInputs& in_;
  const LayerSpec& layer_;
  const AdapterSpec& lora_;
  int expert_;
  Matrix base_[kProjections];
  Matrix lora_tensors_[kLoraTensors];
};

std::vector<std::uint8_t> token_bytes(const std::vector<float>& values, FloatType type) {
  std::vector<std::uint8_t> bytes(values.size() * static_cast<std::size_t>(size_of(type)));
  if (values.empty()) return bytes;
  if (type == FloatType::kF32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
  } else {
    const std::vector<bf16_t> bits = bf16_bits(values);
    std::memcpy(bytes.data(), bits.data(), bytes.size());
  }
  return bytes;
}

Matrix widened(const std::vector<std::uint8_t>& bytes, FloatType type) {
  Matrix values;
  for (std::size_t at = 0; at < bytes.size(); at += static_cast<std::size_t>(size_of(type))) {
    if (type == FloatType::kF32) {
      float value;
      std::memcpy(&value, bytes.data() + at, sizeof value);
      values.push_back(value);
    } else {
      bf16_t bits;
      std::memcpy(&bits, bytes.data() + at, sizeof bits);
      values.push_back(bf16_to_float(bits));
    }
  }
  return values;
}

}  // namespace

LayerInputs make_inputs(const LayerCase& spec, unsigned seed) {
  LayerInputs inputs;
  inputs.spec = spec;
  Values values(seed);
  const LayerSpec& layer = spec.layer;
  for (int p = 0; p < kProjections; ++p) {
    const bool is_down = static_cast<Projection>(p) == Projection::kDown;
    const int columns = is_down ? layer.intermediate : layer.hidden, rows = is_down ? layer.hidden : layer.intermediate;
    const float deviation = 1.0f / std::sqrt(static_cast<float>(columns));
    for (int e = 0; e < layer.experts; ++e) {
      inputs.weights[p].push_back(bf16_bits(values.floats(std::int64_t{rows} * columns, deviation)));
    }
    if (layer.has_bias) inputs.biases[p] = values.floats(std::int64_t{layer.experts} * rows, 0.3f);
  }
  for (int t = 0; t < kLoraTensors; ++t) {
    const TensorShape shape = tensor_shape(layer, spec.lora, static_cast<AdapterTensor>(t));
    const float deviation = shape.columns > 0 ? 1.0f / std::sqrt(static_cast<float>(shape.columns)) : 0.0f;
    inputs.adapter[t] = values.bf16_floats(layer.experts * shape.rows * shape.columns, deviation);
  }
  inputs.x = values.bf16_floats(std::int64_t{spec.tokens} * layer.hidden);
  inputs.dy = values.bf16_floats(std::int64_t{spec.tokens} * layer.hidden);
  const int experts = spec.used_experts > 0 ? spec.used_experts : layer.experts;
  for (int t = 0; t < spec.tokens; ++t) {
    const int first = values.below(experts);
    for (int j = 0; j < spec.top_k; ++j) inputs.ids.push_back((first + j * 2 + 1) % experts);
  }
  for (int r = 0; r < spec.tokens * spec.top_k; ++r) {
    inputs.route_weights.push_back(0.1f + 0.01f * static_cast<float>(values.below(80)));
  }
  return inputs;
}

LayerInputs select_tokens(const LayerInputs& inputs, int first, int count) {
  LayerInputs selected = inputs;
  selected.spec.tokens = count;
  const auto cut = [&](auto& values, int width) {
    values.assign(values.begin() + first * width, values.begin() + (first + count) * width);
  };
  cut(selected.x, inputs.spec.layer.hidden);
  cut(selected.dy, inputs.spec.layer.hidden);
  cut(selected.ids, inputs.spec.top_k);
  cut(selected.route_weights, inputs.spec.top_k);
  return selected;
}

LayerResult reference(const LayerInputs& inputs, const LayerWeights& weights, bool bf16_operands) {
  LayerResult result;
  result.y.assign(inputs.x.size(), 0.0);
  result.dx.assign(inputs.x.size(), 0.0);
  result.d_weights.assign(inputs.ids.size(), 0.0);
  const LayerSpec& layer = inputs.spec.layer;
  for (int t = 0; t < kAdapterTensors; ++t) {
    const TensorShape shape =
        tensor_shape(layer, t < kLoraTensors ? inputs.spec.lora : full_weights(), static_cast<AdapterTensor>(t));
    result.gradients[t].assign(static_cast<std::size_t>(layer.experts * shape.rows * shape.columns), 0.0);
  }
  for (int e = 0; e < inputs.spec.layer.experts; ++e) {
    const ExpertReference expert(inputs, weights, bf16_operands, e);
    for (std::size_t slot = 0; slot < inputs.ids.size(); ++slot) {
      if (inputs.ids[slot] == e) expert.route(slot / static_cast<std::size_t>(inputs.spec.top_k), slot, result);
    }
  }
  return result;
}

LayerWeights load_weights(const LayerInputs& inputs, int nodes) {
  const LayerSpec& layer = inputs.spec.layer;
  LayerWeights weights(layer, inputs.spec.format, nodes);
  for (int p = 0; p < kProjections; ++p) {
    const Projection projection = static_cast<Projection>(p);
    if (projection == Projection::kGate && !has_gate(layer.activation.kind)) continue;
    for (int e = 0; e < layer.experts; ++e) {
      const std::vector<bf16_t>& source = inputs.weights[p][static_cast<std::size_t>(e)];
      weights.set_matrix(projection, e, {source.data(), source.size()});
      if (!layer.has_bias) continue;
      const Span<float> bias = weights.bias(projection, e);
      std::copy_n(inputs.biases[p].begin() + static_cast<std::ptrdiff_t>(bias.size()) * e, bias.size(), bias.begin());
    }
  }
  return weights;
}

AdapterTensors load_adapter(const LayerInputs& inputs) {
  AdapterTensors adapter(inputs.spec.layer, inputs.spec.lora);
  for (int t = 0; t < kLoraTensors; ++t) {
    std::copy(inputs.adapter[t].begin(), inputs.adapter[t].end(), adapter.tensor(static_cast<AdapterTensor>(t)).data());
  }
  return adapter;
}

namespace {

// What one batch brings to the engine and gets from it.
class BatchRun {
 public:
  BatchRun(const LayerInputs& inputs, const LayerWeights& weights, FloatType type, SavePolicy policy)
      : inputs_(inputs),
        weights_(weights),
        type_(type),
        policy_(policy),
        adapter_(load_adapter(inputs)),
        gradients_(inputs.spec.layer, inputs.spec.lora),
        weight_gradients_(inputs.spec.layer, full_weights()),
        x_(token_bytes(inputs.x, type)),
        dy_(token_bytes(inputs.dy, type)),
        y_(x_.size()),
        dx_(x_.size()),
        d_weights_(inputs.ids.size()) {}

  ForwardArgs forward() {
    const LayerCase& spec = inputs_.spec;
    ForwardArgs args;
    args.weights = &weights_;
    args.lora = spec.lora.any() ? &adapter_ : nullptr;
    args.x = {x_.data(), type_};
    args.routing = build_routing({inputs_.ids.data(), inputs_.ids.size()},
                                 {inputs_.route_weights.data(), inputs_.route_weights.size()}, spec.tokens, spec.top_k,
                                 spec.layer.experts);
    args.y = {y_.data(), type_};
    args.save = policy_;
    args.dropout = {5, 2};  // seed and layer; nothing is drawn but for a LoRA with dropout
    return args;
  }
  BackwardArgs backward(const Ticket& ticket) {
    BackwardArgs args;
    args.weights = &weights_;
    args.lora = inputs_.spec.lora.any() ? &adapter_ : nullptr;
    args.gradients = args.lora != nullptr ? &gradients_ : nullptr;
    args.weight_gradients = &weight_gradients_;
    args.ticket = &ticket;
    args.dy = {dy_.data(), type_};
    args.dx = {dx_.data(), type_};
    args.d_weights = d_weights_.data();
    return args;
  }
  LayerResult result() const {
    LayerResult result;
    result.y = widened(y_, type_);
    result.dx = widened(dx_, type_);
    result.d_weights.assign(d_weights_.begin(), d_weights_.end());
    for (int t = 0; t < kAdapterTensors; ++t) {
      const AlignedBuffer<float>& tensor =
          (t < kLoraTensors ? gradients_ : weight_gradients_).tensor(static_cast<AdapterTensor>(t));
      result.gradients[t].assign(tensor.data(), tensor.data() + tensor.size());
    }
    return result;
  }

 private:
  const LayerInputs& inputs_;
  const LayerWeights& weights_;
  FloatType type_;
  SavePolicy policy_;
  AdapterTensors adapter_, gradients_, weight_gradients_;
  std::vector<std::uint8_t> x_, dy_, y_, dx_;
  std::vector<float> d_weights_;
};

}  // namespace

LayerResult run_engine(Engine& engine, const LayerInputs& inputs, FloatType type, SavePolicy policy) {
  const LayerWeights weights = load_weights(inputs, engine.nodes());
  BatchRun run(inputs, weights, type, policy);
  const std::unique_ptr<Ticket> ticket = engine.forward(run.forward());
  engine.backward(run.backward(*ticket));
  return run.result();
}

std::vector<LayerResult> run_together(Engine& engine, const std::vector<LayerInputs>& batches, FloatType type,
                                      SavePolicy policy) {
  const LayerWeights weights = load_weights(batches.front(), engine.nodes());
  std::vector<std::unique_ptr<BatchRun>> runs;
  std::vector<ForwardArgs> forwards;
  for (const LayerInputs& inputs : batches) {
    runs.push_back(std::make_unique<BatchRun>(inputs, weights, type, policy));
    forwards.push_back(runs.back()->forward());
  }
  const std::vector<std::unique_ptr<Ticket>> tickets = engine.forward_together({forwards.data(), forwards.size()});
  std::vector<BackwardArgs> backwards;
  for (std::size_t b = 0; b < runs.size(); ++b) backwards.push_back(runs[b]->backward(*tickets[b]));
  engine.backward_together({backwards.data(), backwards.size()});
  std::vector<LayerResult> results;
  for (const std::unique_ptr<BatchRun>& run : runs) results.push_back(run->result());
  return results;
}

double relative_error(const Matrix& got, const Matrix& expected) {
  double difference = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm > 0.0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

WorstError worst_error(const LayerResult& got, const LayerResult& expected) {
  WorstError worst;
  const auto consider = [&](const std::string& quantity, const Matrix& left, const Matrix& right) {
    const double error = relative_error(left, right);
    if (!(error <= worst.error)) worst = {error, quantity};
  };
  consider("y", got.y, expected.y);
  consider("dx", got.dx, expected.dx);
  consider("d_weights", got.d_weights, expected.d_weights);
  for (int t = 0; t < kAdapterTensors; ++t) {
    consider(adapter_tensor_name(static_cast<AdapterTensor>(t)), got.gradients[t], expected.gradients[t]);
  }
  return worst;
}

bool same_bits(const LayerResult& left, const LayerResult& right) {
  bool same = left.y == right.y && left.dx == right.dx && left.d_weights == right.d_weights;
  for (int t = 0; t < kAdapterTensors; ++t) same = same && left.gradients[t] == right.gradients[t];
  return same;
}

}  // namespace kt_expert
