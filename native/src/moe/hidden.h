// From x to h: gate and up with their LoRA, the activation, and h's own LoRA product. A forward runs it, and a backward
// whose ticket kept only x runs it again, to the same bits.
#pragma once

#include "moe/pass.h"

namespace kt_expert {

class Engine::HiddenPass : protected Engine::Pass {
 public:
  HiddenPass(Engine& engine, FloatType type, const LayerWeights& weights, const AdapterTensors* adapter,
             const AdapterSpec& lora, const Routing& routing, const CancelToken* token, DropoutSeed dropout,
             Carver& carver, const HiddenStore& store);

  // Announces what the constructor takes.
  static void reserve(Carver& carver, const KernelTable& kernels, const LayerSpec& layer, const AdapterSpec& lora,
                      std::int64_t tokens, std::int64_t routes, int workers);

  void run(TokensIn x);

  // Where everything the phases produced lies now.
  HiddenStore kept() const {
    return {store_.gate, store_.up, buffers_.x_a_gate.f32, buffers_.x_a_up.f32, buffers_.h_a_down.f32};
  }

 protected:
  // block += h W_down^T for a block of output columns, of the slice's part of I.
  void multiply_hidden(const BlockTask& at, float* block) const;
  const LoraRows& h_a_down() const { return buffers_.h_a_down; }

 private:
  struct Buffers {
    TokenOperands x;          // rows of H
    OperandRows h;            // [routes, I]
    TokenOperands dropped_x;  // as LoRA sees them, only where its input is dropped
    OperandRows dropped_h;
    LoraRows x_a_gate, x_a_up, h_a_down;
    IntegerBuffer x_codes, h_codes;  // only where the ISA multiplies in integers
    float* plain_rows = nullptr;     // [workers, max(H, I)] a row on its way to codes
  };
  static Buffers take(Carver& carver, const KernelTable& kernels, const LayerSpec& layer, const AdapterSpec& lora,
                      std::int64_t tokens, std::int64_t routes, int workers, const HiddenStore& store);

  bool in_integers() const { return kernels_.integer != nullptr && weights_.format() == WeightFormat::kInt8; }
  // block += rows times a matrix of the base model, in the ISA's floats or its integers.
  void multiply_base(const BlockTask& at, Projection projection, const LeftRows& rows, const IntegerRows& codes,
                     float* block) const;
  // Codes of all routes' rows; row r comes from source row `row_of[r]`, or from row r.
  void quantise(const OperandRows& source, const std::int32_t* row_of, std::int64_t width, const IntegerBuffer& target);
  void project_x();
  void gate_up_block(const BlockTask& at);
  void project_block(const BlockTask& at, Projection projection, float* block) const;
  void project_h();

  HiddenStore store_;
  Buffers buffers_;
};

}  // namespace kt_expert
