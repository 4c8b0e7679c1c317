#include "kt_expert/packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kt_expert/error.h"
#include "kt_expert/topology.h"
#include "weights/codes.h"

namespace kt_expert {
namespace {

constexpr int kWordBytes = 4;
// An AMX tile of int8 is two blocks deep; one that starts at the last block reads another block's length past the end.
constexpr std::int64_t kReadAheadBytes = block_bytes(WeightFormat::kInt8);

// Where a value lies: its 32-bit word inside the block and its place inside the word.
struct Place {
  int word;
  int lane;
};

Place place_of(WeightFormat format, int row, int depth) {
  const int per_word = values_per_word(format);
  return {depth / per_word * kBlockRows + row, depth % per_word};
}

void put_code(WeightFormat format, std::uint8_t* block, int row, int depth, std::uint8_t code) {
  const Place place = place_of(format, row, depth);
  std::uint8_t* word = block + place.word * kWordBytes;
  if (bits_of(format) == 8) {
    word[place.lane] = code;
  } else {
    const int shift = place.lane % 2 * 4;
    std::uint8_t& byte = word[place.lane / 2];
    byte = static_cast<std::uint8_t>((byte & ~(0xF << shift)) | ((code & 0xF) << shift));
  }
}

std::uint8_t get_code(WeightFormat format, const std::uint8_t* block, int row, int depth) {
  const Place place = place_of(format, row, depth);
  const std::uint8_t* word = block + place.word * kWordBytes;
  if (bits_of(format) == 8) return word[place.lane];
  return (word[place.lane / 2] >> (place.lane % 2 * 4)) & 0xF;
}

int group_of(WeightFormat format, int depth) {
  const int group = scale_group(format);
  return group == kWholeRow ? 0 : depth / group;
}

std::int64_t scale_index(const PackedShape& shape, int row, int group) {
  const int groups = shape.scale_groups();
  if (shape.format == WeightFormat::kFp8) return static_cast<std::int64_t>(row / kFp8ScaleRows) * groups + group;
  return (static_cast<std::int64_t>(row / kBlockRows) * groups + group) * kBlockRows + row % kBlockRows;
}

void put_bf16(std::uint8_t* block, int row, int depth, bf16_t value) {
  const Place place = place_of(WeightFormat::kBf16, row, depth);
  std::memcpy(block + place.word * kWordBytes + place.lane * static_cast<int>(sizeof value), &value, sizeof value);
}

bf16_t get_bf16(const std::uint8_t* block, int row, int depth) {
  const Place place = place_of(WeightFormat::kBf16, row, depth);
  bf16_t value;
  std::memcpy(&value, block + place.word * kWordBytes + place.lane * static_cast<int>(sizeof value), sizeof value);
  return value;
}

void require_scale(WeightFormat format, const std::uint8_t* stored) {
  if (format == WeightFormat::kMxfp4) {
    if (*stored == kE8m0Nan) throw InvalidArgument("an mxfp4 scale is NaN (E8M0 code 255); the checkpoint is damaged");
    return;
  }
  const float scale = decode_scale(format, stored);
  const float limit = format == WeightFormat::kFp8 ? kFp8ScaleLimit : INFINITY;
  if (!(std::fabs(scale) < limit)) {
    throw InvalidArgument(std::string("a ") + weight_format_name(format) + " scale is " + std::to_string(scale) +
                          ", expected a finite value" +
                          (format == WeightFormat::kFp8 ? " below " + std::to_string(kFp8ScaleLimit) : ""));
  }
}

// Writes the blocks of one matrix from dense values.
class Encoder {
 public:
  Encoder(const PackedShape& shape, const DenseSource& source, std::uint8_t* blocks, std::uint8_t* scales)
      : shape_(shape), source_(source), blocks_(blocks), scales_(scales) {}

  void copy_bf16() {
    for (int row = 0; row < shape_.rows; ++row) {
      const bf16_t* values = source_.data + row * source_.row_stride;
      std::uint8_t* stream = block_at(row / kBlockRows, 0);
      for (int depth = 0; depth < shape_.depth; ++depth) {
        put_bf16(stream + depth / kBlockDepth * block_bytes(WeightFormat::kBf16), row % kBlockRows, depth % kBlockDepth,
                 values[depth * source_.depth_stride]);
      }
    }
  }

  void quantise() {
    const int row_step = shape_.format == WeightFormat::kFp8 ? kFp8ScaleRows : 1;
    const bool whole_row = scale_group(shape_.format) == kWholeRow;
    const int group_depth = whole_row ? shape_.depth : scale_group(shape_.format);
    for (int row = 0; row < shape_.rows; row += row_step) {
      for (int first = 0; first < shape_.depth; first += group_depth) {
        const Group group{row, std::min(row_step, shape_.rows - row), first,
                          std::min(group_depth, shape_.depth - first)};
        const bool wider = whole_row && source_.row_depth > 0;
        const Group scaled = wider ? Group{row, group.rows, source_.row_first, source_.row_depth} : group;
        quantise_group(group, largest_in(scaled));
      }
    }
  }

 private:
  std::uint8_t* block_at(int row_block, int depth_block) {
    return blocks_ +
           (static_cast<std::int64_t>(row_block) * shape_.depth_blocks() + depth_block) * block_bytes(shape_.format);
  }
  float value_at(int row, int depth) const {
    return bf16_to_float(source_.data[row * source_.row_stride + depth * source_.depth_stride]);
  }

  struct Group {
    int first_row, rows, first_depth, depths;
  };

  float largest_in(const Group& group) const {
    float largest = 0.0f;
    for (int row = group.first_row; row < group.first_row + group.rows; ++row) {
      for (int depth = group.first_depth; depth < group.first_depth + group.depths; ++depth) {
        const float value = value_at(row, depth);
        if (!std::isfinite(value)) {
          throw InvalidArgument("the weight at row " + std::to_string(row) + ", column " + std::to_string(depth) +
                                " is not finite and has no " + weight_format_name(shape_.format) +
                                " code; load this checkpoint as bf16");
        }
        largest = std::max(largest, std::fabs(value));
      }
    }
    return largest;
  }

  void quantise_group(const Group& group, float largest) {
    const std::uint32_t stored = encode_scale(shape_.format, largest);
    std::uint8_t* scale = scales_ + scale_index(shape_, group.first_row, group_of(shape_.format, group.first_depth)) *
                                        scale_bytes(shape_.format);
    std::memcpy(scale, &stored, static_cast<std::size_t>(scale_bytes(shape_.format)));
    const float unit = decode_scale(shape_.format, scale);
    for (int row = group.first_row; row < group.first_row + group.rows; ++row) {
      for (int depth = group.first_depth; depth < group.first_depth + group.depths; ++depth) {
        const float value = unit == 0.0f ? 0.0f : value_at(row, depth) / unit;
        put_code(shape_.format, block_at(row / kBlockRows, depth / kBlockDepth), row % kBlockRows, depth % kBlockDepth,
                 encode_code(shape_.format, value));
      }
    }
  }

  const PackedShape& shape_;
  const DenseSource& source_;
  std::uint8_t* blocks_;
  std::uint8_t* scales_;
};

std::uint8_t native_code(WeightFormat format, const std::uint8_t* row, int depth) {
  if (bits_of(format) == 8) {
    if (format == WeightFormat::kFp8 && is_fp8_nan(row[depth])) {
      throw InvalidArgument("an fp8 weight is NaN; the checkpoint is damaged");
    }
    return row[depth];
  }
  const std::uint8_t nibble = (row[depth / 2] >> (depth % 2 * 4)) & 0xF;
  const bool twos_complement = format == WeightFormat::kInt4G32 || format == WeightFormat::kInt4G128;
  return twos_complement ? static_cast<std::uint8_t>((nibble + kInt4Offset) & 0xF) : nibble;
}

}  // namespace

int PackedShape::scale_groups() const {
  if (scale_bytes(format) == 0) return 0;
  const int group = scale_group(format);
  return group == kWholeRow ? 1 : (depth + group - 1) / group;
}

std::int64_t PackedShape::block_bytes_total() const {
  return static_cast<std::int64_t>(row_blocks()) * depth_blocks() * block_bytes(format);
}

std::int64_t PackedShape::scale_bytes_total() const {
  const std::int64_t scale_rows =
      format == WeightFormat::kFp8 ? (padded_rows() + kFp8ScaleRows - 1) / kFp8ScaleRows : padded_rows();
  // One matrix's scales end on a word, so that the next one's start on one.
  const std::int64_t bytes = scale_rows * scale_groups() * scale_bytes(format);
  return (bytes + kWordBytes - 1) / kWordBytes * kWordBytes;
}

PackedTensor::PackedTensor(int experts, const PackedShape& shape)
    : experts_(experts),
      shape_(shape),
      blocks_(static_cast<std::size_t>(experts * shape.block_bytes_total() + kReadAheadBytes)),
      scales_(static_cast<std::size_t>(experts * shape.scale_bytes_total())) {}

std::string PackedTensor::place(int node) {
  // Pages of the heap are left alone: the wish would outlive the buffer.
  const auto ask = [&](AlignedBuffer<std::uint8_t>& buffer) {
    return buffer.is_mapped() ? prefer_node(buffer.data(), buffer.size(), node) : std::string();
  };
  const std::string obstacle = ask(blocks_);
  return obstacle.empty() ? ask(scales_) : obstacle;
}

PackedMatrix PackedTensor::matrix(int expert) const {
  PackedMatrix view;
  view.shape = shape_;
  view.blocks = blocks_.data() + expert * shape_.block_bytes_total();
  view.scales = scales_.empty() ? nullptr : scales_.data() + expert * shape_.scale_bytes_total();
  view.depth_blocks = shape_.depth_blocks();
  view.scale_groups = shape_.scale_groups();
  return view;
}

void PackedTensor::encode(int expert, const DenseSource& source) {
  Encoder encoder(shape_, source, mutable_blocks(expert), mutable_scales(expert));
  if (shape_.format == WeightFormat::kBf16) {
    encoder.copy_bf16();
  } else {
    encoder.quantise();
  }
}

void PackedTensor::set_native(int expert, const NativeSource& source) {
  const WeightFormat format = shape_.format;
  std::uint8_t* blocks = mutable_blocks(expert);
  for (int row = 0; row < shape_.rows; ++row) {
    const std::uint8_t* codes = source.codes + row * source.row_bytes;
    std::uint8_t* stream =
        blocks + static_cast<std::int64_t>(row / kBlockRows) * shape_.depth_blocks() * block_bytes(format);
    for (int depth = 0; depth < shape_.depth; ++depth) {
      std::uint8_t* block = stream + depth / kBlockDepth * block_bytes(format);
      if (format == WeightFormat::kBf16) {
        bf16_t value;
        std::memcpy(&value, codes + depth * static_cast<int>(sizeof value), sizeof value);
        put_bf16(block, row % kBlockRows, depth % kBlockDepth, value);
      } else {
        put_code(format, block, row % kBlockRows, depth % kBlockDepth, native_code(format, codes, depth));
      }
    }
  }
  const int row_step = format == WeightFormat::kFp8 ? kFp8ScaleRows : 1;
  const int width = scale_bytes(format);
  for (int row = 0; row < shape_.rows; row += row_step) {
    const std::uint8_t* from = source.scales + row / row_step * source.scale_row_bytes;
    for (int group = 0; group < shape_.scale_groups(); ++group) {
      require_scale(format, from + group * width);
      std::memcpy(mutable_scales(expert) + scale_index(shape_, row, group) * width, from + group * width,
                  static_cast<std::size_t>(width));
    }
  }
}

void PackedTensor::set_values(int expert, int row, int first_depth, Span<const bf16_t> values) {
  std::uint8_t* stream = mutable_blocks(expert) + static_cast<std::int64_t>(row / kBlockRows) * shape_.depth_blocks() *
                                                      block_bytes(WeightFormat::kBf16);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const int depth = first_depth + static_cast<int>(i);
    put_bf16(stream + depth / kBlockDepth * block_bytes(WeightFormat::kBf16), row % kBlockRows, depth % kBlockDepth,
             values[i]);
  }
}

float decode_element(const PackedMatrix& matrix, int row, int depth) {
  const WeightFormat format = matrix.shape.format;
  const std::int64_t index = std::int64_t{row / kBlockRows} * matrix.depth_blocks + depth / kBlockDepth;
  const std::uint8_t* block = matrix.blocks + index * block_bytes(format);
  const int block_row = row % kBlockRows, block_depth = depth % kBlockDepth;
  if (format == WeightFormat::kBf16) return bf16_to_float(get_bf16(block, block_row, block_depth));
  const std::int64_t at = scale_index(matrix.shape, row, group_of(format, depth)) * scale_bytes(format);
  return decode_code(format, get_code(format, block, block_row, block_depth)) *
         decode_scale(format, matrix.scales + at);
}

}  // namespace kt_expert
