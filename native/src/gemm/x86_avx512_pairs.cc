// Panels of bf16 pairs from resident weights of every format and from fp32 matrices. What is decoded to fp32 is rounded
// to bf16 once, to nearest even.
#include "gemm/x86_avx512.h"
#include "gemm/x86_avx512_decode.h"

namespace kt_expert {
namespace {

// One row of a panel: the even and the odd depth of sixteen columns side by side.
KT_INLINE __m512i pair(__m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Both are bf16 already.
KT_INLINE __m512i pair_exact(__m512 even, __m512 odd) {
  const __m512i high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), high);
}

template <WeightFormat kFormat>
void expand_forward(const PackedMatrix& w, int row_block, int first_depth, int depth_blocks, void* panel) {
  constexpr int kPerWord = values_per_word(kFormat);
  std::uint8_t* target = static_cast<std::uint8_t*>(panel);
  const std::uint8_t* words = block_at<kFormat>(w, row_block, first_depth);
  for (int b = 0; b < depth_blocks; ++b) {
    const Avx512Reader<kFormat> reader(scales_at<kFormat>(w, row_block, first_depth + b), 0);
    for (int step = 0; step < kBlockDepth / kPerWord; ++step) {
      const __m512i loaded = _mm512_loadu_si512(words);
      words += kWordRowBytes;
      unroll<kPerWord / kPairDepth>([&](auto i) KT_LAMBDA_INLINE {
        const __m512 even = reader.template read<2 * i.value>(loaded);
        const __m512 odd = reader.template read<2 * i.value + 1>(loaded);
        _mm512_storeu_si512(target, pair(even, odd));
        target += kWordRowBytes;
      });
    }
  }
}

template <WeightFormat kFormat>
void expand_backward(const PackedMatrix& w, int depth_block, int first_row, int row_blocks, void* panel0,
                     void* panel1) {
  std::uint8_t* panels[2] = {static_cast<std::uint8_t*>(panel0), static_cast<std::uint8_t*>(panel1)};
  for_each_turned_half<kFormat>(
      w, depth_block, first_row, row_blocks, [&](int half, const __m512(&t)[kBlockRows]) KT_LAMBDA_INLINE {
#pragma GCC unroll 8
        for (int n = 0; n < kBlockRows; n += kPairDepth) {
          const __m512i row = kFormat == WeightFormat::kBf16 ? pair_exact(t[n], t[n + 1]) : pair(t[n], t[n + 1]);
          _mm512_storeu_si512(panels[half], row);
          panels[half] += kWordRowBytes;
        }
      });
}

int padded_depth(int depth, int step) { return (depth + step - 1) / step * step; }

template <int kDepthStep>
void pairs_nk(const float* source, std::int64_t stride, int columns, int depth, void* panel) {
  constexpr int kLanes = 16;
  std::uint8_t* target = static_cast<std::uint8_t*>(panel);
  const int padded = padded_depth(depth, kDepthStep);
  for (int k = 0; k < padded; k += kLanes) {
    const int count = std::max(0, std::min(kLanes, depth - k));
    __m512 block[kPanelColumns];
    load_turned(source + k, stride, columns, count, block);
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j += kPairDepth) {
      if (k + j < padded)
        _mm512_storeu_si512(target + (k + j) / kPairDepth * kWordRowBytes, pair(block[j], block[j + 1]));
    }
  }
}

template <int kDepthStep>
void pairs_kn(const float* source, std::int64_t stride, int columns, int depth, void* panel) {
  std::uint8_t* target = static_cast<std::uint8_t*>(panel);
  const __mmask16 inside = static_cast<__mmask16>((1u << columns) - 1u);
  const auto row = [&](int k) {
    return k < depth ? _mm512_maskz_loadu_ps(inside, source + k * stride) : _mm512_setzero_ps();
  };
  for (int k = 0; k < padded_depth(depth, kDepthStep); k += kPairDepth, target += kWordRowBytes) {
    _mm512_storeu_si512(target, pair(row(k), row(k + 1)));
  }
}

}  // namespace

void set_pair_formats(KernelTable& table, decltype(FormatKernels::direct_forward) multiply_bf16_blocks) {
  for (WeightFormat format : all_weight_formats()) {
    FormatKernels& kernels = table.formats[static_cast<int>(format)];
    with_format(format, [&](auto constant) {
      kernels.expand_forward = expand_forward<constant.value>;
      kernels.expand_backward = expand_backward<constant.value>;
    });
  }
  FormatKernels& bf16 = table.formats[static_cast<int>(WeightFormat::kBf16)];
  bf16.direct_forward = multiply_bf16_blocks;
  bf16.direct_forward_rows = kAllRows;
}

void expand_pairs_nk(const float* source, std::int64_t stride, int columns, int depth, void* panel) {
  pairs_nk<kPairDepth>(source, stride, columns, depth, panel);
}
void expand_pairs_kn(const float* source, std::int64_t stride, int columns, int depth, void* panel) {
  pairs_kn<kPairDepth>(source, stride, columns, depth, panel);
}
void expand_tiles_nk(const float* source, std::int64_t stride, int columns, int depth, void* panel) {
  pairs_nk<kTileDepth>(source, stride, columns, depth, panel);
}
void expand_tiles_kn(const float* source, std::int64_t stride, int columns, int depth, void* panel) {
  pairs_kn<kTileDepth>(source, stride, columns, depth, panel);
}

}  // namespace kt_expert
