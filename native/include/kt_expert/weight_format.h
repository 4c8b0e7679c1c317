// The forms weights take in memory, and the block they all share.
//
// Every matrix [rows, depth] (an output per row, the reduction along a row) is cut into blocks of 16 rows x 32 depth.
// The blocks of 16 rows follow each other along the depth, so one group of rows is one contiguous stream for the
// forward, and one column of blocks is what the backward expands. Inside a block the unit is a 32-bit word that holds
// consecutive depths of one row, 16 rows side by side:
//   bf16            16 words deep, 2 values a word: the operand layout of VDPBF16PS and TDPBF16PS
//   int8, fp8        8 words deep, 4 values a word: the operand layout of VPDPBUSD and TDPBSSD
//   int4, mxfp4, nf4 4 words deep, 8 values a word, lowest nibble first
// so a vector load always yields 8 or 16 rows at one depth, and forward and backward read the same bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kt_expert {

// value = code * scale, with one scale per row and group of depths:
//   bf16     no scale
//   int8     signed, one fp32 scale a row
//   int4     signed in [-8, 7], one bf16 scale per 32 or 128 depths
//   fp8      E4M3 without infinities (OCP 8-bit floating point 1.0), one fp32 scale per 128 rows x 128 depths
//   mxfp4    E2M1 with a power-of-two (E8M0) scale per 32 depths (OCP Microscaling 1.0)
//   nf4      the 16 quantiles of a normal distribution (arXiv:2305.14314, appendix E), one fp32 scale per 64 depths
enum class WeightFormat {
  kBf16 = 0,
  kInt8 = 1,
  kInt4G32 = 2,
  kInt4G128 = 3,
  kFp8 = 4,
  kMxfp4 = 5,
  kNf4 = 6,
};
constexpr int kWeightFormats = 7;

const char* weight_format_name(WeightFormat format);
// Throws InvalidArgument for a name that is not one of the above.
WeightFormat weight_format_from_name(const std::string& name);
std::vector<WeightFormat> all_weight_formats();

constexpr int kBlockRows = 16;
constexpr int kBlockDepth = 32;
constexpr int kRowAlign = 32;  // rows are padded with zeros to two blocks, one step of the deepest reduction unit

constexpr int bits_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return 16;
    case WeightFormat::kInt8:
    case WeightFormat::kFp8:
      return 8;
    default:
      return 4;
  }
}
constexpr int block_bytes(WeightFormat format) { return kBlockRows * kBlockDepth * bits_of(format) / 8; }
// Consecutive depths in one 32-bit word.
constexpr int values_per_word(WeightFormat format) { return 32 / bits_of(format); }

constexpr int kWholeRow = 0;
// Depths that share a scale; kWholeRow where a row has a single one.
constexpr int scale_group(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4G32:
    case WeightFormat::kMxfp4:
      return 32;
    case WeightFormat::kNf4:
      return 64;
    case WeightFormat::kInt4G128:
    case WeightFormat::kFp8:
      return 128;
    default:
      return kWholeRow;
  }
}
constexpr int kFp8ScaleRows = 128;  // rows that share a scale

// Bytes of one stored scale; 0 for bf16.
constexpr int scale_bytes(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return 0;
    case WeightFormat::kMxfp4:
      return 1;
    case WeightFormat::kInt4G32:
    case WeightFormat::kInt4G128:
      return 2;
    default:
      return 4;
  }
}

}  // namespace kt_expert
