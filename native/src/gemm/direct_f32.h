// Products of a few rows with a small fp32 matrix such as LoRA's, read where it lies: a panel would be written to be
// read once or twice. The sums are the panels' sums, in the same order.
//
// I is an ISA's vector set as in tile_loops.h; Turn<I>::load(source, stride, t) fills t[k] with place k of kLanes rows.
#pragma once

#include "gemm/tile_loops.h"

namespace kt_expert {
namespace {

// B(k, n) = b[n * stride + k]. A cache line of one group of rows at a time, then of the next: rows a power of two apart
// share a set of the cache, which holds eight lines.
template <typename I, typename Turn, int kRows>
void direct_nk_panel(const float* const* a, const float* b, std::int64_t stride, int depth, float* c,
                     std::int64_t c_stride) {
  constexpr int kParts = kPanelColumns / I::kLanes, kLine = kPanelColumns;
  Accumulators<I, kRows, 1> tile;
  tile.load(c, c_stride);
  const auto add = [&](int v, int k, typename I::Vec right) KT_LAMBDA_INLINE {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) tile.sum[0][v][m] = I::fma(I::broadcast(a[m] + k), right, tile.sum[0][v][m]);
  };
  int k = 0;
  for (; k + kLine <= depth; k += kLine) {
#pragma GCC unroll 16
    for (int v = 0; v < kParts; ++v) {
#pragma GCC unroll 16
      for (int part = 0; part < kLine; part += I::kLanes) {
        typename I::Vec turned[I::kLanes];
        Turn::load(b + v * I::kLanes * stride + k + part, stride, turned);
#pragma GCC unroll 16
        for (int j = 0; j < I::kLanes; ++j) add(v, k + part + j, turned[j]);
      }
    }
  }
  for (; k < depth; ++k) {
    alignas(64) float line[kPanelColumns];
    for (int n = 0; n < kPanelColumns; ++n) line[n] = b[n * stride + k];
#pragma GCC unroll 16
    for (int v = 0; v < kParts; ++v) add(v, k, I::load(line + v * I::kLanes));
  }
  tile.store(c, c_stride);
}

// B(k, n) = b[k * stride + n]
template <typename I, int kRows>
void direct_kn_panel(const float* const* a, const float* b, std::int64_t stride, int depth, float* c,
                     std::int64_t c_stride) {
  constexpr int kParts = kPanelColumns / I::kLanes;
  Accumulators<I, kRows, 1> tile;
  tile.load(c, c_stride);
  for (int k = 0; k < depth; ++k) {
    typename I::Vec right[kParts];
#pragma GCC unroll 16
    for (int v = 0; v < kParts; ++v) right[v] = I::load(b + k * stride + v * I::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename I::Vec left = I::broadcast(a[m] + k);
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v) tile.sum[0][v][m] = I::fma(left, right[v], tile.sum[0][v][m]);
    }
  }
  tile.store(c, c_stride);
}

template <int kMostRows, typename Body>
KT_INLINE void with_direct_rows(const LeftRows& a, int rows, const Body& body) {
  const float* row[kMostRows];
  for (int m = 0; m < rows; ++m) row[m] = f32_row(a, m);
  with_constant<kMostRows>(rows, [&](auto count) KT_LAMBDA_INLINE { body(row, count); });
}

template <typename I, typename Turn, int kMostRows>
void direct_f32_nk(const LeftRows& a, int rows, const float* b, std::int64_t stride, int panels, int depth, float* c,
                   std::int64_t c_stride) {
  with_direct_rows<kMostRows>(a, rows, [&](const float* const* row, auto count) {
    for (int n = 0; n < panels * kPanelColumns; n += kPanelColumns) {
      direct_nk_panel<I, Turn, count.value>(row, b + n * stride, stride, depth, c + n, c_stride);
    }
  });
}

template <typename I, int kMostRows>
void direct_f32_kn(const LeftRows& a, int rows, const float* b, std::int64_t stride, int panels, int depth, float* c,
                   std::int64_t c_stride) {
  with_direct_rows<kMostRows>(a, rows, [&](const float* const* row, auto count) {
    for (int n = 0; n < panels * kPanelColumns; n += kPanelColumns) {
      direct_kn_panel<I, count.value>(row, b + n, stride, depth, c + n, c_stride);
    }
  });
}

template <typename I, typename Turn, int kMostRows>
void set_direct_f32(KernelTable& table) {
  table.direct_f32_rows = kMostRows;
  table.direct_f32_nk = direct_f32_nk<I, Turn, kMostRows>;
  table.direct_f32_kn = direct_f32_kn<I, kMostRows>;
}

}  // namespace
}  // namespace kt_expert
