#include "kt_expert/ticket_memory.h"

#include <doctest/doctest.h>

#include <algorithm>

namespace kt_expert {
namespace {

constexpr std::size_t kMiB = 1 << 20;

TEST_CASE("memory of a ticket serves the next of about its size") {
  TicketMemory memory;
  TicketMemory::Buffer first = memory.take(8 * kMiB);
  std::fill_n(first.data(), first.size(), std::uint8_t{7});
  memory.give(std::move(first));
  CHECK(memory.kept_bytes() == 8 * kMiB);
  for (const std::size_t bytes : {7 * kMiB, 7 * kMiB + 1, 8 * kMiB + 12345}) {
    CAPTURE(bytes);
    TicketMemory::Buffer next = memory.take(bytes);
    CHECK(next.size() == bytes);
    CHECK(memory.kept_bytes() == 0);
    CHECK(std::count(next.data(), next.data() + 7 * kMiB, 7) == 7 * kMiB);  // the same pages
    next[bytes - 1] = 7;
    memory.give(std::move(next));
  }
}

TEST_CASE("fresh memory takes the place of what is kept") {
  TicketMemory memory;
  for (const std::size_t size : {4, 4, 20}) memory.give(memory.take(size * kMiB));
  CHECK(memory.kept_bytes() == 20 * kMiB);  // the first two were one, which made room for the third
  memory.give(memory.take(2 * kMiB));
  CHECK(memory.kept_bytes() == 2 * kMiB);
  TicketMemory::Buffer used = memory.take(2 * kMiB);
  CHECK(memory.kept_bytes() == 0);
  memory.give(std::move(used));
  memory.drop();
  CHECK(memory.kept_bytes() == 0);
}

TEST_CASE("small memory is the heap's own matter") {
  TicketMemory memory;
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{100}, kMiB - 1}) {
    TicketMemory::Buffer buffer = memory.take(bytes);
    CHECK(buffer.size() == bytes);
    memory.give(std::move(buffer));
    CHECK(memory.kept_bytes() == 0);
  }
}

}  // namespace
}  // namespace kt_expert
