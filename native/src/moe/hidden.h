// From x to h: gate and up with their LoRA, the activation, and h's own LoRA product. A forward runs it, and a backward
// whose ticket kept only x runs it again, to the same bits.
#pragma once

#include "moe/pass.h"

namespace kt_expert {

class Engine::HiddenPass : protected Engine::Pass {
 public:
  HiddenPass(Engine& engine, FloatType type, const LayerWeights& weights, const LoraTensors* adapter,
             const Routing& routing, const CancelToken* token, Carver& carver, const HiddenStore& store);

  // Announces what the constructor takes.
  static void reserve(Carver& carver, const KernelTable& kernels, const LayerSpec& layer, const LoraSpec& lora,
                      std::int64_t tokens, std::int64_t routes, int workers);

  void run(TokensIn x);

  // Where everything the phases produced lies now.
  HiddenStore kept() const {
    return {store_.gate, store_.up, buffers_.x_a_gate.f32, buffers_.x_a_up.f32, buffers_.h_a_down.f32};
  }
  const OperandRows& h() const { return buffers_.h; }
  const LoraRows& h_a_down() const { return buffers_.h_a_down; }

 protected:
  bool in_integers() const { return kernels_.integer != nullptr && weights_.format() == WeightFormat::kInt8; }
  const IntegerBuffer& h_codes() const { return buffers_.h_codes; }

 private:
  struct Buffers {
    OperandRows x;         // [tokens, H]
    OperandRows gathered;  // [routes, H], only where the rung does not follow row indices
    OperandRows h;         // [routes, I]
    LoraRows x_a_gate, x_a_up, h_a_down;
    IntegerBuffer x_codes, h_codes;  // only where the rung multiplies in integers
    float* plain_rows = nullptr;     // [workers, max(H, I)] a row on its way to codes
  };
  static Buffers take(Carver& carver, const KernelTable& kernels, const LayerSpec& layer, const LoraSpec& lora,
                      std::int64_t tokens, std::int64_t routes, int workers, const HiddenStore& store);

  LeftRows x_rows(const RowTask& task) const;
  void gather();
  // Codes of all routes' rows; row r comes from source row `row_of[r]`, or from row r.
  void quantise(const OperandRows& source, const std::int32_t* row_of, std::int64_t width, const IntegerBuffer& target);
  void project_x();
  void gate_up();
  void gate_up_block(const RowTask& task, const LayerWeights::Slice& slice, int first_column, int columns, int worker);
  void project_column_block(const RowTask& task, const LayerWeights::Slice& slice, Projection projection,
                            int first_column, int columns, float* block, int worker) const;
  void project_h();

  HiddenStore store_;
  Buffers buffers_;
};

}  // namespace kt_expert
