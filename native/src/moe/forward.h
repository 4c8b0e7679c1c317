// One forward in progress.
#pragma once

#include "moe/hidden.h"

namespace kt_expert {

class Engine::ForwardPass : private Engine::HiddenPass {
 public:
  static std::unique_ptr<Ticket> run(Engine& engine, const ForwardArgs& args);
  static std::int64_t scratch_bytes(const KernelTable& kernels, const LayerSpec& layer, const AdapterSpec& lora,
                                    std::int64_t tokens, std::int64_t routes, int nodes, int workers);

 private:
  ForwardPass(Engine& engine, const ForwardArgs& args, const AdapterSpec& lora, Carver& carver,
              const HiddenStore& store);
  void down();
  void down_block(const BlockTask& at, float* block) const;

  const ForwardArgs& args_;
  TokenSums sums_;
};

}  // namespace kt_expert
