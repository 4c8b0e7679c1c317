#include "kt_expert/ticket_memory.h"

#include <algorithm>
#include <utility>

namespace kt_expert {
namespace {

// A kept buffer serves where at most a quarter of it has to be cut off or added: small tickets must not eat up large
// ones, and adding much is no better than beginning anew.
constexpr std::size_t kMostChange = 4;

std::size_t distance(const TicketMemory::Buffer& buffer, std::size_t bytes) {
  return std::max(buffer.size(), bytes) - std::min(buffer.size(), bytes);
}

}  // namespace

TicketMemory::Buffer TicketMemory::take(std::size_t bytes) {
  if (bytes >= Buffer::kMapThresholdBytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto best = std::min_element(kept_.begin(), kept_.end(), [&](const Buffer& left, const Buffer& right) {
      return distance(left, bytes) < distance(right, bytes);
    });
    if (best != kept_.end() && distance(*best, bytes) <= bytes / kMostChange) {
      best->remap(bytes);
      std::swap(*best, kept_.back());
      Buffer found = std::move(kept_.back());
      kept_.pop_back();
      return found;
    }
    for (std::size_t dropped = 0; dropped < bytes && !kept_.empty(); kept_.pop_back()) dropped += kept_.back().size();
  }
  return Buffer(bytes);
}

void TicketMemory::give(Buffer buffer) noexcept {
  if (!buffer.is_mapped()) return;  // the heap keeps small ones itself
  try {
    std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(std::move(buffer));
  } catch (...) {
    // No memory to remember it by: it goes back to the system.
  }
}

std::int64_t TicketMemory::kept_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::int64_t total = 0;
  for (const Buffer& buffer : kept_) total += static_cast<std::int64_t>(buffer.size());
  return total;
}

void TicketMemory::drop() {
  std::vector<Buffer> dropped;  // outlives the lock, which unmapping need not hold
  std::lock_guard<std::mutex> lock(mutex_);
  dropped.swap(kept_);
}

}  // namespace kt_expert
