// Scratch that one operation carves up and the next reuses.
#pragma once

#include <atomic>
#include <cstdint>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/engine.h"

namespace kt_expert {

// Adds up what an operation will take, or hands it out: one function describes both, so the announced size is the size
// taken.
class Carver {
 public:
  explicit Carver(std::uint8_t* base) : base_(base) {}

  template <typename T>
  T* take(std::int64_t count) {
    const std::int64_t at = used_;
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + kLineBytes - 1) / kLineBytes * kLineBytes;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  std::int64_t used() const { return used_; }

 private:
  static constexpr std::int64_t kLineBytes = 64;

  std::uint8_t* base_;
  std::int64_t used_ = 0;
};

class Engine::Arena {
 public:
  // `bytes` of it for the length of one operation, however that ends.
  class Lease {
   public:
    Lease(Arena& arena, std::int64_t bytes) : arena_(arena), data_(arena.reset(bytes)) {}
    ~Lease() { arena_.trim(); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    std::uint8_t* data() const { return data_; }

   private:
    Arena& arena_;
    std::uint8_t* data_;
  };

  // What it holds beyond what the running operation leased; may be asked for at any time.
  std::int64_t kept_bytes() const { return kept_.load(); }
  // Between operations only.
  void drop() {
    buffer_ = AlignedBuffer<std::uint8_t>();
    kept_.store(0);
  }

 private:
  // Keeps its memory across operations up to kKeepBytes.
  std::uint8_t* reset(std::int64_t bytes) {
    const std::size_t wanted = static_cast<std::size_t>(bytes);
    if (wanted > buffer_.size()) {
      drop();  // before the larger one is mapped
      buffer_ = AlignedBuffer<std::uint8_t>(wanted);
    }
    kept_.store(static_cast<std::int64_t>(buffer_.size() - wanted));
    return buffer_.data();
  }
  void trim() {
    if (static_cast<std::int64_t>(buffer_.size()) > kKeepBytes) drop();
    kept_.store(static_cast<std::int64_t>(buffer_.size()));
  }

  // Fresh pages cost about a microsecond each, so ordinary batches reuse them; an unusually large one gives them back.
  static constexpr std::int64_t kKeepBytes = std::int64_t{1} << 30;

  AlignedBuffer<std::uint8_t> buffer_;
  std::atomic<std::int64_t> kept_{0};
};

}  // namespace kt_expert
