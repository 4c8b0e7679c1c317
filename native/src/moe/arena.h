// Scratch that one operation carves up and the next reuses.
#pragma once

#include <cstdint>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/engine.h"

namespace kt_expert {

class Engine::Arena {
 public:
  // Makes `floats` available from the start. Keeps its memory across operations up to kKeepBytes.
  void reset(std::int64_t floats) {
    const std::size_t wanted = static_cast<std::size_t>(floats);
    if (wanted > buffer_.size()) {
      buffer_ = AlignedBuffer<float>();  // free before the larger one is mapped
      buffer_ = AlignedBuffer<float>(wanted);
    }
    used_ = 0;
  }
  float* take(std::int64_t floats) {
    float* start = buffer_.data() + used_;
    used_ += padded(floats);
    return start;
  }
  void trim() {
    if (static_cast<std::int64_t>(buffer_.size() * sizeof(float)) > kKeepBytes) buffer_ = AlignedBuffer<float>();
  }
  static std::int64_t padded(std::int64_t floats) { return (floats + kLineFloats - 1) / kLineFloats * kLineFloats; }

 private:
  static constexpr std::int64_t kLineFloats = 16;
  // Fresh pages cost about a microsecond each, so ordinary batches reuse them; an unusually large one gives them back.
  static constexpr std::int64_t kKeepBytes = std::int64_t{1} << 30;

  AlignedBuffer<float> buffer_;
  std::int64_t used_ = 0;
};

}  // namespace kt_expert
