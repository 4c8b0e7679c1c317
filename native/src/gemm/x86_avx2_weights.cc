// AVX2 + FMA on resident weights of every format: products straight from the blocks, and panels expanded from them.
#include <algorithm>

#include "gemm/grouped_tiles.h"
#include "gemm/x86_avx2.h"
#include "gemm/x86_avx2_codes.h"

namespace kt_expert {
namespace {

// Four lanes of two rows of words, of which one is 16 bytes further along the rows' streams.
KT_INLINE __m256 load_two(const std::uint8_t* low, const std::uint8_t* high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(reinterpret_cast<const float*>(low))),
                              _mm_loadu_ps(reinterpret_cast<const float*>(high)), 1);
}

constexpr int kQuarterRows = 4;
constexpr int kQuarterBytes = kQuarterRows * 4;

// Eight depth steps of four rows turned: t[n] gets row n's eight words.
KT_INLINE void turn_quarter(const std::uint8_t* at, __m256i (&t)[kQuarterRows]) {
  const __m256 r0 = load_two(at, at + 4 * kWordRowBytes);
  const __m256 r1 = load_two(at + kWordRowBytes, at + 5 * kWordRowBytes);
  const __m256 r2 = load_two(at + 2 * kWordRowBytes, at + 6 * kWordRowBytes);
  const __m256 r3 = load_two(at + 3 * kWordRowBytes, at + 7 * kWordRowBytes);
  const __m256 low01 = _mm256_unpacklo_ps(r0, r1), high01 = _mm256_unpackhi_ps(r0, r1);
  const __m256 low23 = _mm256_unpacklo_ps(r2, r3), high23 = _mm256_unpackhi_ps(r2, r3);
  t[0] = _mm256_castps_si256(_mm256_shuffle_ps(low01, low23, 0x44));
  t[1] = _mm256_castps_si256(_mm256_shuffle_ps(low01, low23, 0xEE));
  t[2] = _mm256_castps_si256(_mm256_shuffle_ps(high01, high23, 0x44));
  t[3] = _mm256_castps_si256(_mm256_shuffle_ps(high01, high23, 0xEE));
}

// bf16, int8 and fp8 turn words and read them after: a group of eight words spans turned_depth() depths, in the order
// [place in the word][word].
constexpr int kWordGroup = 8;
template <WeightFormat kFormat>
constexpr bool turns_words() {
  return bits_of(kFormat) >= 8;
}
template <WeightFormat kFormat>
constexpr int turned_depth() {
  return turns_words<kFormat>() ? kWordGroup * values_per_word(kFormat) : kWordGroup;
}
template <WeightFormat kFormat>
constexpr int group_bytes() {
  return kWordRowBytes * turned_depth<kFormat>() / values_per_word(kFormat);
}

// Half a block of rows into both panels; bf16 is two groups, a panel each, and the words of int8 and fp8 are one group
// whose first two places make one panel and whose last two the other.
template <WeightFormat kFormat>
KT_INLINE void expand_words(const std::uint8_t* words, const std::uint8_t* scales, int half,
                            float* const (&panels)[2]) {
  constexpr bool kTwoGroups = values_per_word(kFormat) == 2;
  const RowReader<kFormat> reader(scales);
#pragma GCC unroll 2
  for (int quarter = 0; quarter < 2; ++quarter) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __m256i t[kQuarterRows];
      turn_quarter(words + quarter * kQuarterBytes + (kTwoGroups ? p * group_bytes<kFormat>() : 0), t);
      float* target = panels[p] + quarter * kQuarterRows * kPanelColumns;
      const auto store = [&](auto place) KT_LAMBDA_INLINE {
#pragma GCC unroll 4
        for (int n = 0; n < kQuarterRows; ++n) {
          const int row = half * kHalfRows + quarter * kQuarterRows + n;
          _mm256_storeu_ps(target + n * kPanelColumns, reader.template read<place.value>(t[n], row));
          _mm256_storeu_ps(target + n * kPanelColumns + kWordGroup, reader.template read<place.value + 1>(t[n], row));
        }
      };
      if constexpr (kTwoGroups) {
        store(std::integral_constant<int, 0>{});
      } else if (p == 0) {
        store(std::integral_constant<int, 0>{});
      } else {
        store(std::integral_constant<int, 2>{});
      }
    }
  }
}

// The words of a 4-bit format hold eight depths of one row: each is read into a register of its own.
template <WeightFormat kFormat>
KT_INLINE void expand_nibbles(const std::uint8_t* block, const std::uint8_t* scales, float* const (&panels)[2]) {
  const NibbleRows<kFormat> rows(scales);
#pragma GCC unroll 4
  for (int group = 0; group < kBlockDepth / kWordGroup; ++group) {
    float* panel = panels[group / 2] + group % 2 * kWordGroup;
    for (int n = 0; n < kBlockRows; ++n) {
      _mm256_storeu_ps(panel + n * kPanelColumns, rows.read(block + group * kWordRowBytes + n * 4, n));
    }
  }
}

template <WeightFormat kFormat>
void expand_backward(const PackedMatrix& w, int depth_block, int first_row, int row_blocks, void* panel0,
                     void* panel1) {
  constexpr int kAheadRows = 4;  // row blocks, a stride apart that no prefetcher follows
  float* panels[2] = {static_cast<float*>(panel0), static_cast<float*>(panel1)};
  for (int b = 0; b < row_blocks; ++b) {
    const int row_block = first_row + b;
    const std::uint8_t* block = block_at<kFormat>(w, row_block, depth_block);
    const std::uint8_t* scales = scales_at<kFormat>(w, row_block, depth_block);
    prefetch(block_at<kFormat>(w, row_block + kAheadRows, depth_block), block_bytes(kFormat));
    if constexpr (turns_words<kFormat>()) {
      for (int half = 0; half < 2; ++half) {
        float* const halves[2] = {panels[0] + half * kHalfRows * kPanelColumns,
                                  panels[1] + half * kHalfRows * kPanelColumns};
        expand_words<kFormat>(block + half * kWordRowBytes / 2, scales, half, halves);
      }
    } else {
      expand_nibbles<kFormat>(block, scales, panels);
    }
    for (float*& panel : panels) panel += kBlockRows * kPanelColumns;
  }
}

// Eight rows of W times one depth block, added to kRows rows of C; a[m] points at the eight values of row m. Groups
// take turns after four rows: a column's sum is a chain of dependent additions, and chains wait for each other in
// order.
template <WeightFormat kFormat, int kRows>
KT_INLINE void backward_words(const float* const (&a)[kRows], const std::uint8_t* words, const std::uint8_t* scales,
                              int half, float* c, std::int64_t c_stride) {
  constexpr int kPerWord = values_per_word(kFormat), kGroups = kBlockDepth / turned_depth<kFormat>();
  constexpr int kSums = kGroups * kPerWord;
  const RowReader<kFormat> reader(scales);
  __m256 sum[kRows][kSums];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sum[m][i] = _mm256_loadu_ps(c + m * c_stride + i * kWordGroup);
  }
#pragma GCC unroll 2
  for (int quarter = 0; quarter < 2; ++quarter) {
#pragma GCC unroll 2
    for (int group = 0; group < kGroups; ++group) {
      __m256i t[kQuarterRows];
      turn_quarter(words + group * group_bytes<kFormat>() + quarter * kQuarterBytes, t);
#pragma GCC unroll 4
      for (int n = 0; n < kQuarterRows; ++n) {
        const int row = quarter * kQuarterRows + n;
        unroll<kPerWord>([&](auto i) KT_LAMBDA_INLINE {
          const __m256 weights = reader.template read<i.value>(t[n], half * kHalfRows + row);
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) {
            __m256& target = sum[m][group * kPerWord + i.value];
            target = _mm256_fmadd_ps(_mm256_broadcast_ss(a[m] + row), weights, target);
          }
        });
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) _mm256_storeu_ps(c + m * c_stride + i * kWordGroup, sum[m][i]);
  }
}

// A block of a 4-bit format, as many of its depths at a time as sums fit registers.
template <WeightFormat kFormat, int kRows>
KT_INLINE void backward_nibbles(const float* const (&a)[kRows], const std::uint8_t* block, const std::uint8_t* scales,
                                float* c, std::int64_t c_stride) {
  constexpr int kGroups = kBlockDepth / kWordGroup, kAtOnce = kRows <= 2 ? kGroups : 2;
  const NibbleRows<kFormat> rows(scales);
#pragma GCC unroll 2
  for (int first = 0; first < kGroups; first += kAtOnce) {
    float* target = c + first * kWordGroup;
    __m256 sum[kRows][kAtOnce];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) sum[m][i] = _mm256_loadu_ps(target + m * c_stride + i * kWordGroup);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kBlockRows; ++n) {
      __m256 weights[kAtOnce];
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) weights[i] = rows.read(block + (first + i) * kWordRowBytes + n * 4, n);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const __m256 left = _mm256_broadcast_ss(a[m] + n);
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) sum[m][i] = _mm256_fmadd_ps(left, weights[i], sum[m][i]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) _mm256_storeu_ps(target + m * c_stride + i * kWordGroup, sum[m][i]);
    }
  }
}

// Row blocks read side by side: each is a stream of its own for the hardware's prefetchers, and one stream alone does
// not keep enough of memory busy.
constexpr int kStreams = 2;

// Up to kStreams row blocks of W, all columns.
template <WeightFormat kFormat, int kRows>
void backward_rows(const float* const* rows, const PackedMatrix& w, int row_block, int streams, const BlockRange& range,
                   float* c, std::int64_t c_stride) {
  // Far enough to hide memory's latency, near enough to stay in the first-level cache.
  constexpr int kAheadBlocks = 1024 / block_bytes(kFormat);
  const std::int64_t row_bytes = static_cast<std::int64_t>(w.depth_blocks) * block_bytes(kFormat);
  const std::int64_t next_rows = streams * row_bytes - std::int64_t{range.depth_blocks} * block_bytes(kFormat);
  const std::uint8_t* column = block_at<kFormat>(w, row_block, range.first_depth);
  for (int j = 0; j < range.depth_blocks; ++j, column += block_bytes(kFormat)) {
    const std::int64_t ahead =
        kAheadBlocks * block_bytes(kFormat) + (j + kAheadBlocks < range.depth_blocks ? 0 : next_rows);
    float* target = c + static_cast<std::int64_t>(j) * kBlockDepth;
    for (int stream = 0; stream < streams; ++stream) {
      const std::uint8_t* words = column + stream * row_bytes;
      const std::uint8_t* scales = scales_at<kFormat>(w, row_block + stream, range.first_depth + j);
      prefetch(words + ahead, block_bytes(kFormat));
      const float* a[kRows];
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) a[m] = rows[m] + stream * kBlockRows;
      if constexpr (turns_words<kFormat>()) {
        for (int half = 0; half < 2; ++half, words += kWordRowBytes / 2) {
          backward_words<kFormat, kRows>(a, words, scales, half, target, c_stride);
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) a[m] += kHalfRows;
        }
      } else {
        backward_nibbles<kFormat, kRows>(a, words, scales, target, c_stride);
      }
    }
  }
}

// Above, turning a block for every tile of rows costs more than a panel.
template <WeightFormat kFormat>
constexpr int direct_backward_rows() {
  return turned_depth<kFormat>() > 16 ? 2 : 4;
}

template <WeightFormat kFormat>
void direct_backward(const LeftRows& a, int rows, const PackedMatrix& w, const BlockRange& range, float* c,
                     std::int64_t c_stride) {
  constexpr int kMost = direct_backward_rows<kFormat>();
  const float* row[kMost];
  for (int m = 0; m < rows; ++m) row[m] = f32_row(a, m);
  for (int b = 0; b < range.row_blocks; b += kStreams) {
    const int streams = std::min(kStreams, range.row_blocks - b);
    with_constant<kMost>(rows, [&](auto count) {
      backward_rows<kFormat, count.value>(row, w, range.first_row + b, streams, range, c, c_stride);
    });
    for (int m = 0; m < rows; ++m) row[m] += kStreams * kBlockRows;
  }
}

// Column kPerWord w + i of a group of columns <-> its place [i][w].
template <int kPerWord, bool kToWords>
void reorder(float* c, std::int64_t c_stride, int rows, int columns) {
  constexpr int kGroup = kWordGroup * kPerWord;
  float turned[kGroup];
  for (int m = 0; m < rows; ++m) {
    for (int first = 0; first < columns; first += kGroup) {
      float* group = c + m * c_stride + first;
      for (int word = 0; word < kWordGroup; ++word) {
        for (int i = 0; i < kPerWord; ++i) {
          const int by_column = word * kPerWord + i, by_word = i * kWordGroup + word;
          turned[kToWords ? by_word : by_column] = group[kToWords ? by_column : by_word];
        }
      }
      std::copy_n(turned, kGroup, group);
    }
  }
}

// Up to how many rows it pays to decode at every use instead of expanding once; measured.
constexpr int kDirectBf16Rows = 12;
constexpr int kDirectQuantisedRows = 4;

template <WeightFormat kFormat>
constexpr FormatKernels kernels_of() {
  FormatKernels kernels{};
  if constexpr (is_grouped(kFormat)) {
    set_grouped_forward<Avx2, kFormat, kDirectQuantisedRows>(kernels);
  } else {
    set_plain_forward<Avx2, kFormat>(kernels, kFormat == WeightFormat::kBf16 ? kDirectBf16Rows : kDirectQuantisedRows);
  }
  kernels.direct_backward_rows = direct_backward_rows<kFormat>();
  kernels.direct_backward = direct_backward<kFormat>;
  kernels.expand_backward = expand_backward<kFormat>;
  if constexpr (turns_words<kFormat>()) {
    kernels.to_word_order = reorder<values_per_word(kFormat), true>;
    kernels.to_column_order = reorder<values_per_word(kFormat), false>;
  }
  return kernels;
}

}  // namespace

FormatKernels avx2_format(WeightFormat format) {
  return with_format(format, [](auto constant) { return kernels_of<constant.value>(); });
}

}  // namespace kt_expert
