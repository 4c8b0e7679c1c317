#include "moe/pass.h"

#include <cstring>

namespace kt_expert {

const float* as_f32(const KernelTable& kernels, ThreadPool& pool, const CancelToken* token, TokensIn in,
                    std::int64_t rows, std::int64_t width, float* copy) {
  if (in.type == FloatType::kF32) return static_cast<const float*>(in.data);
  const bf16_t* source = static_cast<const bf16_t*>(in.data);
  for_each_rows(pool, rows, token, [&](std::int64_t first, std::int64_t last, int) {
    kernels.bf16_to_f32(source + first * width, copy + first * width, (last - first) * width);
  });
  return copy;
}

void combine_routes(const KernelTable& kernels, ThreadPool& pool, const CancelToken* token, const Routing& routing,
                    const float* rows, int width, bool weighted, float* worker_rows, TokensOut out) {
  for_each_rows(pool, routing.tokens, token, [&](std::int64_t first, std::int64_t last, int worker) {
    for (std::int64_t t = first; t < last; ++t) {
      float* sum = out.type == FloatType::kF32 ? static_cast<float*>(out.data) + t * width
                                               : worker_rows + static_cast<std::int64_t>(worker) * width;
      std::memset(sum, 0, static_cast<std::size_t>(width) * sizeof(float));
      for (int j = 0; j < routing.top_k; ++j) {
        const std::int32_t row = routing.slot_row[static_cast<std::size_t>(t * routing.top_k + j)];
        if (row == Routing::kDropped) continue;
        const float weight = weighted ? routing.row_weight[static_cast<std::size_t>(row)] : 1.0f;
        kernels.add_scaled(weight, rows + static_cast<std::int64_t>(row) * width, sum, width);
      }
      if (out.type == FloatType::kBf16) kernels.f32_to_bf16(sum, static_cast<bf16_t*>(out.data) + t * width, width);
    }
  });
}

}  // namespace kt_expert
