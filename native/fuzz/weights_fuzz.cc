// Bytes of a checkpoint become weights, and weights are multiplied: no input may crash, read outside its buffers or
// decode to something the reference does not.
//
// The input is a header of eight bytes (format, rows, depth, batch rows, split) and then codes and scales, repeated as
// often as the shape asks for.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "gemm/gemm.h"
#include "kt_expert/error.h"
#include "kt_expert/layer.h"
#include "kt_expert/routing.h"

namespace kt_expert {
namespace {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t next() { return size_ == 0 ? 0 : data_[at_++ % size_]; }
  std::vector<std::uint8_t> take(std::size_t count) {
    std::vector<std::uint8_t> taken(count);
    for (std::uint8_t& byte : taken) byte = next();
    return taken;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

void require(bool holds) {
  if (!holds) std::abort();
}

void check_weights(Bytes& bytes) {
  constexpr int kMostRows = 200, kMostDepth = 200, kMostNodes = 4;
  LayerSpec spec;
  spec.experts = 1;
  const WeightFormat format = static_cast<WeightFormat>(bytes.next() % kWeightFormats);
  spec.intermediate = 1 + bytes.next() % kMostRows;
  spec.hidden = 1 + bytes.next() % kMostDepth;
  LayerWeights weights(spec, format, 1 + bytes.next() % kMostNodes);
  const Projection projection = static_cast<Projection>(bytes.next() % kProjections);
  const bool is_down = projection == Projection::kDown;
  const PackedShape shape{format, is_down ? spec.hidden : spec.intermediate, is_down ? spec.intermediate : spec.hidden};
  const std::size_t row_bytes = static_cast<std::size_t>((shape.depth * bits_of(format) + 7) / 8);
  const int scale_rows = format == WeightFormat::kFp8 ? (shape.rows + kFp8ScaleRows - 1) / kFp8ScaleRows : shape.rows;
  const std::vector<std::uint8_t> codes = bytes.take(static_cast<std::size_t>(shape.rows) * row_bytes);
  const std::vector<std::uint8_t> scales =
      bytes.take(static_cast<std::size_t>(scale_rows * shape.scale_groups() * scale_bytes(format)));
  try {
    weights.set_native(projection, 0, {codes.data(), codes.size()}, {scales.data(), scales.size()});
  } catch (const InvalidArgument&) {
    return;
  }
  for (const float value : weights.dequantized(projection, 0)) {
    require(format == WeightFormat::kBf16 || !std::isnan(value));
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
  if (bytes.next() % 2 == 0) {
    kt_expert::check_weights(bytes);
  } else {
    kt_expert::check_routing(bytes);
  }
  return 0;
}
