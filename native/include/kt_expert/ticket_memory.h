// Memory of tickets that are done, for tickets to come: a fresh page costs a fault, and a ticket has thousands of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "kt_expert/aligned_buffer.h"

namespace kt_expert {

// Tickets end on any thread, and may outlive their engine. Fresh memory is taken only after as much kept memory was
// given back: tickets of changing sizes do not pile up.
class TicketMemory {
 public:
  using Buffer = AlignedBuffer<std::uint8_t>;

  // `bytes` of it, holding whatever was there.
  Buffer take(std::size_t bytes);
  void give(Buffer buffer) noexcept;
  std::int64_t kept_bytes() const;
  // Gives everything back to the system.
  void drop();

 private:
  mutable std::mutex mutex_;
  std::vector<Buffer> kept_;
};

}  // namespace kt_expert
