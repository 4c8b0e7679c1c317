// From x to h: gate and up with their LoRA, the activation, and h's own LoRA product. A forward runs it, and a backward
// whose ticket kept only x runs it again, to the same bits.
#pragma once

#include "moe/pass.h"

namespace kt_expert {

class Engine::HiddenPass : protected Engine::Pass {
 public:
  // `stores`: of each batch.
  HiddenPass(Engine& engine, FloatType type, const LayerWeights& weights, std::vector<Batch> batches,
             const CancelToken* token, StageClock& clock, Carver& carver, std::vector<HiddenStore> stores);

  // Announces what the constructor takes.
  static void reserve(Carver& carver, const KernelTable& kernels, const LayerSpec& layer,
                      const std::vector<BatchSize>& batches, int workers);

  // `x`: of each batch.
  void run(const std::vector<TokensIn>& x);

  // Where everything the phases produced of a batch lies now.
  HiddenStore kept(std::size_t batch) const {
    const OwnBuffers& own = buffers_.own[batch];
    return {stores_[batch].gate, stores_[batch].up, own.x_a_gate.f32, own.x_a_up.f32, own.h_a_down.f32};
  }

 protected:
  // block += h W_down^T for a block of output columns, of the slice's part of I.
  void multiply_hidden(const BlockTask& at, float* block) const;
  const LoraRows& h_a_down(std::size_t batch) const { return buffers_.own[batch].h_a_down; }

 private:
  // Of one batch: what LoRA reads and makes, and what it reads where its input is dropped.
  struct OwnBuffers {
    LoraRows x_a_gate, x_a_up, h_a_down;
    TokenOperands dropped_x;
    OperandRows dropped_h;
  };
  // Rows of all batches.
  struct Buffers {
    TokenOperands x;                 // rows of H
    OperandRows h;                   // [routes, I]
    IntegerBuffer x_codes, h_codes;  // only where the ISA multiplies in integers
    float* plain_rows = nullptr;     // [workers, max(H, I)] a row on its way to codes
    std::vector<OwnBuffers> own;
  };
  static Buffers take(Carver& carver, const KernelTable& kernels, const LayerSpec& layer,
                      const std::vector<BatchSize>& batches, int workers, const std::vector<HiddenStore>& stores);

  bool in_integers() const { return kernels_.integer != nullptr && weights_.format() == WeightFormat::kInt8; }
  // block += rows times a matrix of the base model, in the ISA's floats or its integers.
  void multiply_base(const BlockTask& at, Projection projection, const LeftRows& rows, const IntegerRows& codes,
                     float* block) const;
  // Codes of all routes' rows; row r comes from source row `row_of[r]`, or from row r.
  void quantise(const OperandRows& source, const std::int32_t* row_of, std::int64_t width, const IntegerBuffer& target);
  void project_x();
  void gate_up_block(const BlockTask& at);
  void finish_rows(const BlockTask& at, const BatchRows& rows, float* gate, float* up);
  void project_block(const BlockTask& at, Projection projection, float* block) const;
  void project_h();

  std::vector<HiddenStore> stores_;
  Buffers buffers_;
};

}  // namespace kt_expert
