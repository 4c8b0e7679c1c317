// One forward in progress, of one batch or several.
#pragma once

#include "moe/hidden.h"

namespace kt_expert {

class Engine::ForwardPass : private Engine::HiddenPass {
 public:
  // All of one layer's weights and one type of tokens.
  static std::vector<std::unique_ptr<Ticket>> run(Engine& engine, Span<const ForwardArgs> args);
  static std::int64_t scratch_bytes(const KernelTable& kernels, const LayerSpec& layer,
                                    const std::vector<BatchSize>& batches, int nodes, int workers);

 private:
  ForwardPass(Engine& engine, Span<const ForwardArgs> args, std::vector<Batch> batches, StageClock& clock,
              Carver& carver, std::vector<HiddenStore> stores);
  void down(const std::vector<TokensOut>& y);
  void down_block(const BlockTask& at, float* block) const;

  TokenSums sums_;
};

}  // namespace kt_expert
