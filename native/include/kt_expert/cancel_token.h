// Cancellation shared between the caller and the workers: polled between tiles, never inside one.
#pragma once

#include <atomic>
#include <chrono>

#include "kt_expert/error.h"

namespace kt_expert {

class CancelToken {
 public:
  CancelToken() = default;
  explicit CancelToken(double timeout_s)
      : deadline_(Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s))),
        has_deadline_(true) {}

  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool fired() const {
    return cancelled_.load(std::memory_order_relaxed) || (has_deadline_ && Clock::now() >= deadline_);
  }
  void check() const {
    if (cancelled_.load(std::memory_order_relaxed)) throw Cancelled("the request was cancelled while it ran");
    if (has_deadline_ && Clock::now() >= deadline_) {
      throw DeadlineExceeded("the request's deadline passed while it ran; raise the deadline or send fewer tokens");
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::atomic<bool> cancelled_{false};
  Clock::time_point deadline_{};
  bool has_deadline_ = false;
};

}  // namespace kt_expert
