#include "kt_expert/layer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kt_expert/error.h"
#include "kt_expert/topology.h"

namespace kt_expert {
namespace {

constexpr int kMaxExperts = 1 << 16;  // ids travel as int32; far above any published model
constexpr int kMaxWidth = 1 << 20;

void require_size(const char* name, int value, int limit) {
  if (value < 1 || value > limit) {
    throw InvalidArgument(std::string(name) + " is " + std::to_string(value) + ", expected a value in [1, " +
                          std::to_string(limit) + "]");
  }
}

void require_count(const char* name, std::size_t got, std::int64_t expected) {
  if (static_cast<std::int64_t>(got) != expected) {
    throw InvalidArgument(std::string(name) + " holds " + std::to_string(got) + " elements, expected " +
                          std::to_string(expected));
  }
}

struct SliceShape {
  int first;
  int count;
  PackedShape matrices[kProjections];  // rows 0 where absent
};

// Slices of I as even as whole scale groups allow.
std::vector<SliceShape> slice_shapes(const LayerSpec& spec, WeightFormat format, int nodes) {
  require_size("the number of memory nodes", nodes, kMaxMemoryNodes);
  // int8 may be multiplied in steps of 64 depths, which must not reach into another slice.
  const int unit = std::max({kRowAlign, scale_group(format), format == WeightFormat::kInt8 ? 64 : 0});
  const std::int64_t units = (spec.intermediate + unit - 1) / unit;
  std::vector<SliceShape> slices;
  for (int node = 0; node < nodes; ++node) {
    // Rounded up, so that the first slice is never empty.
    const auto border = [&](int n) {
      return std::min<int>(spec.intermediate, static_cast<int>((units * n + nodes - 1) / nodes) * unit);
    };
    const int first = border(node), last = border(node + 1);
    SliceShape slice{first, last - first, {}};
    if (slice.count > 0) {
      const PackedShape into{format, slice.count, spec.hidden};
      if (has_gate(spec.activation.kind)) slice.matrices[static_cast<int>(Projection::kGate)] = into;
      slice.matrices[static_cast<int>(Projection::kUp)] = into;
      slice.matrices[static_cast<int>(Projection::kDown)] = {format, spec.hidden, slice.count};
    }
    slices.push_back(slice);
  }
  return slices;
}

}  // namespace

void LayerSpec::validate() const {
  require_size("num_experts", experts, kMaxExperts);
  require_size("hidden_size", hidden, kMaxWidth);
  require_size("intermediate_size", intermediate, kMaxWidth);
  if (has_limit(activation.kind) && !(activation.limit > 0.0f)) {
    throw InvalidArgument("the clamped swiglu needs a limit above 0, got " + std::to_string(activation.limit));
  }
}

LayerWeights::LayerWeights(const LayerSpec& spec, WeightFormat format, int nodes, const std::vector<int>& memory_nodes)
    : spec_(spec), format_(format), memory_nodes_(memory_nodes) {
  spec_.validate();
  if (!memory_nodes.empty() && static_cast<int>(memory_nodes.size()) != nodes) {
    throw InvalidArgument(std::to_string(memory_nodes.size()) + " memory nodes are named for " + std::to_string(nodes));
  }
  for (const SliceShape& shape : slice_shapes(spec, format, nodes)) {
    Slice slice;
    slice.first = shape.first;
    slice.count = shape.count;
    for (int p = 0; p < kProjections; ++p) {
      if (shape.matrices[p].rows == 0) continue;
      slice.matrices[p] = PackedTensor(spec.experts, shape.matrices[p]);
      if (memory_nodes.empty()) continue;
      const std::string obstacle = slice.matrices[p].place(memory_nodes[slices_.size()]);
      if (!obstacle.empty()) placement_obstacle_ = obstacle;
    }
    slices_.push_back(std::move(slice));
  }
  if (!spec.has_bias) return;
  for (int p = 0; p < kProjections; ++p) {
    const Projection projection = static_cast<Projection>(p);
    if (projection == Projection::kGate && !has_gate(spec.activation.kind)) continue;
    biases_[p] =
        AlignedBuffer<float>(static_cast<std::size_t>(spec.experts) * static_cast<std::size_t>(rows_of(projection)));
  }
}

void LayerWeights::require_expert(int expert) const {
  if (expert < 0 || expert >= spec_.experts) {
    throw InvalidArgument("expert " + std::to_string(expert) + " is outside [0, " + std::to_string(spec_.experts) +
                          ")");
  }
}

void LayerWeights::require_projection(Projection projection) const {
  if (projection == Projection::kGate && !has_gate(spec_.activation.kind)) {
    throw InvalidArgument("this layer's activation has no gate projection");
  }
}

Span<float> LayerWeights::bias(Projection projection, int expert) {
  require_expert(expert);
  require_projection(projection);
  if (!spec_.has_bias) throw InvalidArgument("this layer has no biases; set has_bias in its spec");
  const int size = rows_of(projection);
  return {biases_[static_cast<int>(projection)].data() + static_cast<std::int64_t>(expert) * size,
          static_cast<std::size_t>(size)};
}

const float* LayerWeights::bias(Projection projection, int expert) const {
  if (!spec_.has_bias) return nullptr;
  return biases_[static_cast<int>(projection)].data() + static_cast<std::int64_t>(expert) * rows_of(projection);
}

std::int64_t LayerWeights::bytes() const {
  std::int64_t total = 0;
  for (const Slice& slice : slices_) {
    for (const PackedTensor& matrix : slice.matrices) total += matrix.bytes();
  }
  for (const AlignedBuffer<float>& bias : biases_) total += static_cast<std::int64_t>(bias.size() * sizeof(float));
  return total;
}

std::int64_t LayerWeights::bytes_of(const LayerSpec& spec, WeightFormat format, int nodes) {
  std::int64_t total = 0;
  for (const SliceShape& slice : slice_shapes(spec, format, nodes)) {
    for (const PackedShape& matrix : slice.matrices) {
      if (matrix.rows > 0) total += spec.experts * matrix.bytes();
    }
  }
  if (!spec.has_bias) return total;
  const std::int64_t gates = has_gate(spec.activation.kind) ? 2 : 1;
  return total + spec.experts * (gates * spec.intermediate + spec.hidden) * static_cast<std::int64_t>(sizeof(float));
}

void LayerWeights::encode(Projection projection, int expert, const DenseSource& whole) {
  for (Slice& slice : slices_) {
    if (slice.count == 0) continue;
    DenseSource part = whole;
    if (projection == Projection::kDown) {
      part.data += slice.first * whole.depth_stride;
      part.row_first = -slice.first;  // scales of a whole row see the other slices too
      part.row_depth = spec_.intermediate;
    } else {
      part.data += slice.first * whole.row_stride;
      part.row_depth = spec_.hidden;
    }
    slice.matrices[static_cast<int>(projection)].encode(expert, part);
  }
}

void LayerWeights::set_matrix(Projection projection, int expert, Span<const bf16_t> source) {
  require_expert(expert);
  require_projection(projection);
  require_count("the matrix", source.size(), static_cast<std::int64_t>(rows_of(projection)) * columns_of(projection));
  encode(projection, expert, {source.data(), columns_of(projection), 1});
}

void LayerWeights::set_gate_up(int expert, Span<const bf16_t> source, GateUpOrder order, bool transposed) {
  require_expert(expert);
  require_projection(Projection::kGate);
  const std::int64_t hidden = spec_.hidden, intermediate = spec_.intermediate;
  require_count("gate_up", source.size(), 2 * hidden * intermediate);
  const std::int64_t line = transposed ? 1 : hidden;  // from one of the 2I outputs to the next
  const std::int64_t depth_stride = transposed ? 2 * intermediate : 1;
  const bool interleaved = order == GateUpOrder::kInterleaved;
  for (const Projection projection : {Projection::kGate, Projection::kUp}) {
    const std::int64_t half = projection == Projection::kGate ? 0 : (interleaved ? 1 : intermediate);
    encode(projection, expert, {source.data() + half * line, interleaved ? 2 * line : line, depth_stride});
  }
}

void LayerWeights::set_gate_up_bias(int expert, Span<const float> source, GateUpOrder order) {
  require_count("gate_up bias", source.size(), 2 * static_cast<std::int64_t>(spec_.intermediate));
  const Span<float> halves[2] = {bias(Projection::kGate, expert), bias(Projection::kUp, expert)};
  const std::size_t intermediate = static_cast<std::size_t>(spec_.intermediate);
  for (std::size_t half = 0; half < 2; ++half) {
    for (std::size_t i = 0; i < intermediate; ++i) {
      halves[half][i] = source[order == GateUpOrder::kInterleaved ? 2 * i + half : half * intermediate + i];
    }
  }
}

void LayerWeights::set_down(int expert, Span<const bf16_t> source, bool transposed) {
  require_expert(expert);
  require_count("down", source.size(), static_cast<std::int64_t>(spec_.hidden) * spec_.intermediate);
  encode(Projection::kDown, expert,
         {source.data(), transposed ? 1 : spec_.intermediate, transposed ? spec_.hidden : 1});
}

void LayerWeights::set_native(Projection projection, int expert, Span<const std::uint8_t> codes,
                              Span<const std::uint8_t> scales) {
  require_expert(expert);
  require_projection(projection);
  const PackedShape whole{format_, rows_of(projection), columns_of(projection)};
  const std::int64_t row_bytes = (static_cast<std::int64_t>(whole.depth) * bits_of(format_) + 7) / 8;
  const std::int64_t scale_row_bytes = whole.scale_groups() * static_cast<std::int64_t>(scale_bytes(format_));
  const int scale_rows = format_ == WeightFormat::kFp8 ? (whole.rows + kFp8ScaleRows - 1) / kFp8ScaleRows : whole.rows;
  require_count("the codes", codes.size(), whole.rows * row_bytes);
  require_count("the scales", scales.size(), scale_rows * scale_row_bytes);
  const int group = scale_group(format_);
  for (Slice& slice : slices_) {
    if (slice.count == 0) continue;
    NativeSource part{codes.data(), row_bytes, scales.data(), scale_row_bytes};
    if (projection == Projection::kDown) {
      part.codes += static_cast<std::int64_t>(slice.first) * bits_of(format_) / 8;
      if (group != kWholeRow) part.scales += slice.first / group * scale_bytes(format_);
    } else {
      part.codes += slice.first * row_bytes;
      const int scale_row = format_ == WeightFormat::kFp8 ? slice.first / kFp8ScaleRows : slice.first;
      part.scales += scale_row * scale_row_bytes;
    }
    slice.matrices[static_cast<int>(projection)].set_native(expert, part);
  }
}

void LayerWeights::set_values(Projection projection, int expert, int row, int first_column, Span<const bf16_t> values) {
  require_expert(expert);
  require_projection(projection);
  const int count = static_cast<int>(values.size()), end = first_column + count;
  if (format_ != WeightFormat::kBf16) throw InvalidArgument("single values can be set of weights in bf16 only");
  if (row < 0 || row >= rows_of(projection) || first_column < 0 || end > columns_of(projection)) {
    throw InvalidArgument("row " + std::to_string(row) + ", columns " + std::to_string(first_column) + " to " +
                          std::to_string(end) + " are outside the matrix");
  }
  for (Slice& slice : slices_) {
    PackedTensor& matrix = slice.matrices[static_cast<int>(projection)];
    const int last = slice.first + slice.count;
    if (projection != Projection::kDown) {
      if (row >= slice.first && row < last) matrix.set_values(expert, row - slice.first, first_column, values);
      continue;
    }
    const int from = std::max(first_column, slice.first), to = std::min(end, last);
    if (from >= to) continue;
    matrix.set_values(expert, row, from - slice.first,
                      {values.data() + (from - first_column), static_cast<std::size_t>(to - from)});
  }
}

std::vector<float> LayerWeights::dequantized(Projection projection, int expert) const {
  std::vector<float> values(static_cast<std::size_t>(std::int64_t{rows_of(projection)} * columns_of(projection)));
  dequantize_rows(projection, expert, 0, rows_of(projection), values.data());
  return values;
}

void LayerWeights::dequantize_rows(Projection projection, int expert, int first_row, int rows, float* into) const {
  require_expert(expert);
  require_projection(projection);
  const std::int64_t columns = columns_of(projection);
  for (const Slice& slice : slices_) {
    if (slice.count == 0) continue;
    const PackedMatrix matrix = slice.matrix(projection, expert);
    const bool is_down = projection == Projection::kDown;
    const int row_offset = is_down ? 0 : slice.first, column_offset = is_down ? slice.first : 0;
    const int from = std::max(first_row, row_offset), to = std::min(first_row + rows, row_offset + matrix.shape.rows);
    for (int row = from; row < to; ++row) {
      float* line = into + (row - first_row) * columns + column_offset;
      for (int depth = 0; depth < matrix.shape.depth; ++depth) {
        line[depth] = decode_element(matrix, row - row_offset, depth);
      }
    }
  }
}

}  // namespace kt_expert
