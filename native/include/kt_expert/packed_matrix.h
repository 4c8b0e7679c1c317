// One weight matrix in its resident form, and the owner of one such matrix per expert.
#pragma once

#include <cstdint>
#include <string>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/bf16.h"
#include "kt_expert/span.h"
#include "kt_expert/weight_format.h"

namespace kt_expert {

// Sizes of one matrix [rows, depth] in one format.
struct PackedShape {
  WeightFormat format = WeightFormat::kBf16;
  int rows = 0;
  int depth = 0;

  int row_blocks() const { return (rows + kRowAlign - 1) / kRowAlign * (kRowAlign / kBlockRows); }
  int depth_blocks() const { return (depth + kBlockDepth - 1) / kBlockDepth; }
  int padded_rows() const { return row_blocks() * kBlockRows; }
  // Groups of depths with a scale of their own.
  int scale_groups() const;
  std::int64_t block_bytes_total() const;
  std::int64_t scale_bytes_total() const;
  std::int64_t bytes() const { return block_bytes_total() + scale_bytes_total(); }
};

// View of one matrix. Scales lie as [row block][group][16 rows], for fp8 as [row / 128][group].
struct PackedMatrix {
  PackedShape shape;
  const std::uint8_t* blocks = nullptr;
  const std::uint8_t* scales = nullptr;
  int depth_blocks = 0;
  int scale_groups = 0;
};

// A block and the scales that apply to it: 16, for fp8 one, for bf16 none. The format is a template argument because
// kernels ask in their inner loops.
template <WeightFormat kFormat>
inline const std::uint8_t* block_at(const PackedMatrix& w, int row_block, int depth_block) {
  return w.blocks + (static_cast<std::int64_t>(row_block) * w.depth_blocks + depth_block) * block_bytes(kFormat);
}
template <WeightFormat kFormat>
inline const std::uint8_t* scales_at(const PackedMatrix& w, int row_block, int depth_block) {
  constexpr int kGroup = scale_group(kFormat), kBytes = scale_bytes(kFormat);
  const std::int64_t group = kGroup == kWholeRow ? 0 : depth_block * kBlockDepth / kGroup;
  if constexpr (kFormat == WeightFormat::kFp8) {
    return w.scales + (row_block * kBlockRows / kFp8ScaleRows * std::int64_t{w.scale_groups} + group) * kBytes;
  }
  return w.scales + (row_block * std::int64_t{w.scale_groups} + group) * kBlockRows * kBytes;
}

// Row-major values to encode: element (row, depth) is data[row * row_stride + depth * depth_stride].
struct DenseSource {
  const bf16_t* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t depth_stride = 1;
  // The whole row these depths are part of: a scale of a whole row is taken over all of it.
  int row_first = 0;
  int row_depth = 0;  // 0: the matrix's own depth
};

// Codes and scales as a checkpoint stores them, row-major: one code a byte (int8, fp8), two a byte, lower nibble first
// (4 bit; int4 in two's complement), two bytes (bf16). Scales: [rows][groups] in their stored width, for fp8
// [ceil(rows / 128)][groups].
struct NativeSource {
  const std::uint8_t* codes = nullptr;
  std::int64_t row_bytes = 0;
  const std::uint8_t* scales = nullptr;
  std::int64_t scale_row_bytes = 0;
};

class PackedTensor {
 public:
  PackedTensor() = default;
  PackedTensor(int experts, const PackedShape& shape);

  const PackedShape& shape() const { return shape_; }
  PackedMatrix matrix(int expert) const;
  std::int64_t bytes() const { return experts_ * shape_.bytes(); }

  // Quantises (or, for bf16, copies) one expert's matrix; a scale puts its group's largest magnitude on the format's
  // largest code (mxfp4: in that code's binade). Throws InvalidArgument for a value that is not finite in a quantised
  // format.
  void encode(int expert, const DenseSource& source);
  // Before the first encode: asks for the pages from a memory node. Returns what stands in the way, as prefer_node
  // does.
  std::string place(int node);
  // Takes the codes as they are. Throws InvalidArgument for a NaN code or a scale the format cannot apply.
  void set_native(int expert, const NativeSource& source);
  // A part of one row of bf16, from a depth on.
  void set_values(int expert, int row, int first_depth, Span<const bf16_t> values);

 private:
  std::uint8_t* mutable_blocks(int expert) { return blocks_.data() + expert * shape_.block_bytes_total(); }
  std::uint8_t* mutable_scales(int expert) { return scales_.data() + expert * shape_.scale_bytes_total(); }

  std::int64_t experts_ = 0;
  PackedShape shape_;
  AlignedBuffer<std::uint8_t> blocks_;
  AlignedBuffer<std::uint8_t> scales_;
};

// The value a kernel works with, in fp32: the definition every ISA and every test follows.
float decode_element(const PackedMatrix& matrix, int row, int depth);

}  // namespace kt_expert
