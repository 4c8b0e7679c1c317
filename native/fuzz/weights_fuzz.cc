// Bytes of a checkpoint become weights, and weights are multiplied; routes come from a trainer. No input may crash,
// read outside its buffers, decode to what is no number, or make a row's result depend on the rows beside it.
//
// The input is a byte that picks the target, of which requests_fuzz.cc holds one more, and then its numbers.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "fuzz/bytes.h"
#include "fuzz/requests_fuzz.h"
#include "kt_expert/engine.h"
#include "kt_expert/error.h"
#include "kt_expert/layer.h"
#include "kt_expert/routing.h"

namespace kt_expert {
namespace {

// Beyond these, products may be subnormal or infinite, and multiplying by a power of two and back is not exact.
constexpr float kLeastOrdinary = 1e-10f, kMostOrdinary = 1e10f;
// What a subnormal activation (silu of -90) may become behind such a weight.
constexpr float kOfSubnormals = 1e-25f;

enum class Filled { kRefused, kOrdinary, kExtreme };

// Codes and scales as a checkpoint would hold them.
Filled fill(Bytes& bytes, LayerWeights& weights, Projection projection) {
  const LayerSpec& spec = weights.spec();
  const bool is_down = projection == Projection::kDown;
  const WeightFormat format = weights.format();
  const PackedShape shape{format, is_down ? spec.hidden : spec.intermediate, is_down ? spec.intermediate : spec.hidden};
  const std::size_t row_bytes = static_cast<std::size_t>((shape.depth * bits_of(format) + 7) / 8);
  const int scale_rows = format == WeightFormat::kFp8 ? (shape.rows + kFp8ScaleRows - 1) / kFp8ScaleRows : shape.rows;
  const std::vector<std::uint8_t> codes = bytes.take(static_cast<std::size_t>(shape.rows) * row_bytes);
  const std::vector<std::uint8_t> scales =
      bytes.take(static_cast<std::size_t>(scale_rows * shape.scale_groups() * scale_bytes(format)));
  try {
    weights.set_native(projection, 0, {codes.data(), codes.size()}, {scales.data(), scales.size()});
  } catch (const InvalidArgument&) {
    return Filled::kRefused;
  }
  bool ordinary = true;
  for (const float value : weights.dequantized(projection, 0)) {
    require(format == WeightFormat::kBf16 || !std::isnan(value));
    const float magnitude = std::fabs(value);
    ordinary = ordinary && (magnitude == 0.0f || (magnitude >= kLeastOrdinary && magnitude <= kMostOrdinary));
  }
  return ordinary ? Filled::kOrdinary : Filled::kExtreme;
}

// Forward and backward of the first `tokens` of x; y and dx, one after the other.
std::vector<float> multiply(Engine& engine, const LayerWeights& weights, const std::vector<float>& x, int tokens) {
  const std::size_t width = static_cast<std::size_t>(weights.spec().hidden),
                    size = width * static_cast<std::size_t>(tokens);
  const std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens), 0);
  const std::vector<float> route_weights(static_cast<std::size_t>(tokens), 0.5f);
  std::vector<float> result(2 * size), d_weights(static_cast<std::size_t>(tokens));
  ForwardArgs forward;
  forward.weights = &weights;
  forward.x = {x.data(), FloatType::kF32};
  forward.routing = build_routing({ids.data(), ids.size()}, {route_weights.data(), route_weights.size()}, tokens, 1, 1);
  forward.y = {result.data(), FloatType::kF32};
  forward.save = SavePolicy::kActivations;
  const std::unique_ptr<Ticket> ticket = engine.forward(forward);
  BackwardArgs backward;
  backward.weights = &weights;
  backward.ticket = ticket.get();
  backward.dy = {x.data(), FloatType::kF32};
  backward.dx = {result.data() + size, FloatType::kF32};
  backward.d_weights = d_weights.data();
  engine.backward(backward);
  return result;
}

void check_weights(Bytes& bytes) {
  constexpr int kMostRows = 200, kMostDepth = 200, kMostNodes = 4, kMostTokens = 20;
  LayerSpec spec;
  spec.experts = 1;
  const WeightFormat format = static_cast<WeightFormat>(bytes.next() % kWeightFormats);
  spec.intermediate = 1 + bytes.next() % kMostRows;
  spec.hidden = 1 + bytes.next() % kMostDepth;
  const int nodes = 1 + bytes.next() % kMostNodes, tokens = 1 + bytes.next() % kMostTokens;
  LayerWeights weights(spec, format, nodes);
  bool ordinary = true;
  for (int projection = 0; projection < kProjections; ++projection) {
    const Filled filled = fill(bytes, weights, static_cast<Projection>(projection));
    if (filled == Filled::kRefused) return;
    ordinary = ordinary && filled == Filled::kOrdinary;
  }
  std::vector<float> x(static_cast<std::size_t>(tokens * spec.hidden));
  for (float& value : x) value = static_cast<float>(static_cast<std::int8_t>(bytes.next())) / 64.0f;
  static Engine engines[kMostNodes] = {{1, "", 1}, {1, "", 2}, {1, "", 3}, {1, "", 4}};
  Engine& engine = engines[nodes - 1];
  const std::vector<float> together = multiply(engine, weights, x, tokens), alone = multiply(engine, weights, x, 1);
  const std::size_t width = static_cast<std::size_t>(spec.hidden), size = together.size() / 2;
  for (std::size_t i = 0; i < 2 * width; ++i) {
    const float expected = together[i < width ? i : size + i - width];
    const bool same = alone[i] == expected || (std::isnan(alone[i]) && std::isnan(expected));
    require(!ordinary || same || std::fabs(alone[i] - expected) < kOfSubnormals);
  }
}

void check_routing(Bytes& bytes) {
  constexpr int kMostTokens = 8, kMostRoutes = 4, kMostExperts = 5;
  const int tokens = bytes.next() % kMostTokens, top_k = 1 + bytes.next() % kMostRoutes;
  const int experts = 1 + bytes.next() % kMostExperts;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  for (int route = 0; route < tokens * top_k; ++route) {
    ids.push_back(static_cast<std::int8_t>(bytes.next()) % (experts + 2));
    weights.push_back(bytes.next() == 0 ? NAN : 0.5f);
  }
  try {
    const Routing routing =
        build_routing({ids.data(), ids.size()}, {weights.data(), weights.size()}, tokens, top_k, experts);
    require(routing.expert_begin.back() == routing.routes);
    for (const std::int32_t token : routing.row_token) require(token >= 0 && token < tokens);
  } catch (const InvalidArgument&) {
    return;
  }
}

}  // namespace
}  // namespace kt_expert

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kt_expert::Bytes bytes(data, size);
  const int target = bytes.next() % 16;
  if (target == 0) {
    kt_expert::check_weights(bytes);
  } else if (target < 8) {
    kt_expert::check_requests(bytes);
  } else {
    kt_expert::check_routing(bytes);
  }
  return 0;
}
