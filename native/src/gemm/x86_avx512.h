// What the AVX-512 and AMX kernel files share.
#pragma once

#include "gemm/kernels.h"

namespace kt_expert {

FormatKernels avx512_format(WeightFormat format);

// Everything of a table but products: loops over floats, and sums over rows.
void set_avx512_loops(KernelTable& table);

// Panels of bf16 pairs, [depth / 2][16 columns][2], for VDPBF16PS and TDPBF16PS, from fp32 matrices; the depth is
// padded with zeros to kPairDepth, or, for tiles, to kTileDepth.
void expand_pairs_nk(const float* source, std::int64_t stride, int columns, int depth, void* panel);
void expand_pairs_kn(const float* source, std::int64_t stride, int columns, int depth, void* panel);
void expand_tiles_nk(const float* source, std::int64_t stride, int columns, int depth, void* panel);
void expand_tiles_kn(const float* source, std::int64_t stride, int columns, int depth, void* panel);
// All formats of an ISA that multiplies such panels. The blocks of bf16 weights are panels already, so their forward
// is given: it multiplies them where they lie.
void set_pair_formats(KernelTable& table, decltype(FormatKernels::direct_forward) multiply_bf16_blocks);

// A row's largest magnitude becomes 127; returns what one step is worth, 0 for a row of zeros.
float quantise_row(const float* values, std::int64_t count, std::int8_t* target);

constexpr int kPairDepth = 2;   // one VDPBF16PS
constexpr int kTileDepth = 32;  // one TDPBF16PS

}  // namespace kt_expert
