// Cancellation shared between the caller and the workers: polled between tiles, never inside one.
#pragma once

#include <atomic>
#include <chrono>
#include <string>

#include "kt_expert/error.h"

namespace kt_expert {

class CancelToken {
 public:
  CancelToken() = default;
  // Throws InvalidArgument for a time that is not a number in [0, kMaxTimeoutS].
  explicit CancelToken(double timeout_s) : deadline_(Clock::now() + checked(timeout_s)), has_deadline_(true) {}

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
  // A year. The clock counts nanoseconds in 64 bits, so a double far above it would not convert.
  static constexpr double kMaxTimeoutS = 365.0 * 24 * 3600;

  static Clock::duration checked(double timeout_s) {
    if (!(timeout_s >= 0.0 && timeout_s <= kMaxTimeoutS)) {
      throw InvalidArgument("timeout is " + std::to_string(timeout_s) + " s, expected a number in [0, " +
                            std::to_string(kMaxTimeoutS) + "]");
    }
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s));
  }

  std::atomic<bool> cancelled_{false};
  Clock::time_point deadline_{};
  bool has_deadline_ = false;
};

}  // namespace kt_expert
