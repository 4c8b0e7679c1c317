// How rows and columns are cut into tasks.
#pragma once

#include <cstdint>

#include "gemm/gemm.h"
#include "gemm/tiles.h"

namespace kt_expert {

// Blocks of C in a worker's scratch: many rows and few columns, two of which stay in a 512 KiB L2 beside a panel, or
// few rows and many columns, so that weights are read in long stretches.
constexpr int kTaskColumns = 128;
constexpr int kTaskRows = kMostProductRows;
constexpr int kFewRows = 16;
constexpr int kFewRowsColumns = 512;
constexpr std::int64_t kBlockFloats = std::int64_t{kTaskRows + kRowSlack} * kTaskColumns;
static_assert((kFewRows + kRowSlack) * kFewRowsColumns <= kBlockFloats, "both shapes fit");
constexpr int kLeastColumns = 32;   // one block of the weights' depth
constexpr int kPieceRows = 64;      // rows of an elementwise task: long enough to hide the hand-out of tasks
constexpr int kTasksPerWorker = 2;  // at least, so that one slow core is not waited for long
constexpr int kRankAlign = kPanelColumns;

inline std::int64_t ceil_div(std::int64_t extent, std::int64_t width) { return (extent + width - 1) / width; }
inline std::int64_t align_up(std::int64_t extent, std::int64_t unit) { return ceil_div(extent, unit) * unit; }

// Width of fp32 rows of LoRA intermediates.
inline std::int64_t rank_stride(int rank) { return align_up(rank, kRankAlign); }

}  // namespace kt_expert
