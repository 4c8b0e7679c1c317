#include "kt_expert/topology.h"

#include <doctest/doctest.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "kt_expert/aligned_buffer.h"
#include "kt_expert/error.h"
#include "kt_expert/thread_pool.h"

namespace kt_expert {
namespace {

std::vector<int> cpus_of_this_thread() {
  cpu_set_t set;  // glibc's own, where the tested code speaks to the kernel
  CPU_ZERO(&set);
  REQUIRE(sched_getaffinity(0, sizeof set, &set) == 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

TEST_CASE("lists of cores") {
  CHECK(parse_cpu_list("").empty());
  CHECK(parse_cpu_list("5") == std::vector<int>{5});
  CHECK(parse_cpu_list("0-3,8,10-11") == std::vector<int>{0, 1, 2, 3, 8, 10, 11});
  for (const char* bad : {",", "1,", "a", "1-", "3-1", "1 2", "99999999"}) {
    CAPTURE(bad);
    CHECK_THROWS_AS(parse_cpu_list(bad), InvalidArgument);
  }
}

TEST_CASE("every core of this process belongs to one memory node") {
  std::vector<int> all;
  for (const MemoryNode& node : memory_nodes()) all.insert(all.end(), node.cpus.begin(), node.cpus.end());
  std::sort(all.begin(), all.end());
  CHECK(all == cpus_of_this_thread());
}

TEST_CASE("workers stay on the cores of their node, and the caller only while a loop runs") {
  const std::vector<int> before = cpus_of_this_thread();
  const std::vector<int> first{before.front()}, last{before.back()};
  ThreadPool pool(4, {first, last});
  std::atomic<int> ran{0};
  const std::int64_t tasks[] = {200, 200};
  pool.run_on_nodes({tasks, 2}, [&](int, std::int64_t, int worker) {
    CHECK(cpus_of_this_thread() == (worker < 2 ? first : last));
    ++ran;
  });
  CHECK(ran == 400);
  CHECK(cpus_of_this_thread() == before);
}

TEST_CASE("workers are dealt by the cores of their node") {
  const int core = cpus_of_this_thread().front();
  // Only the number of cores counts here: naming one several times pins to it all the same.
  ThreadPool pool(8, {std::vector<int>(2, core), std::vector<int>(6, core)});
  std::vector<std::atomic<int>> of_node(2);
  std::vector<std::atomic<bool>> seen(8);
  std::atomic<int> arrived{0};
  // A task a worker: each waits for all others, so that every worker takes one, of its own node while there are any.
  const std::int64_t tasks[] = {2, 6};
  pool.run_on_nodes({tasks, 2}, [&](int node, std::int64_t, int worker) {
    of_node[static_cast<std::size_t>(node)] += (worker < 2) == (node == 0) ? 1 : 0;
    seen[static_cast<std::size_t>(worker)] = true;
    for (++arrived; arrived < 8;) std::this_thread::yield();
  });
  CHECK(of_node[0] == 2);
  CHECK(of_node[1] == 6);
  CHECK(std::all_of(seen.begin(), seen.end(), [](const auto& each) { return each.load(); }));
}

TEST_CASE("memory is asked for from a node that exists") {
  AlignedBuffer<std::uint8_t> memory(4 << 20);
  const std::string obstacle = prefer_node(memory.data(), memory.size(), memory_nodes().front().id);
  if (!obstacle.empty()) {
    // Containers may forbid the call; then that is what is said, and the memory is an ordinary one.
    CHECK((obstacle == "mbind: Operation not permitted" || obstacle == "mbind: Function not implemented"));
  }
  memory[memory.size() - 1] = 1;
  CHECK(prefer_node(memory.data(), memory.size(), 64) == "there is no memory node 64");
  CHECK(prefer_node(memory.data(), 10, 0).empty());  // less than a page
}

}  // namespace
}  // namespace kt_expert
