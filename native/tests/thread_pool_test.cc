#include "kt_expert/thread_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

namespace kt_expert {
namespace {

TEST_CASE("every task runs once, for any number of threads and tasks") {
  for (int threads : {1, 2, 3, 16}) {
    ThreadPool pool(threads);
    for (std::int64_t tasks : {0, 1, 2, 17, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      pool.run(tasks, [&](std::int64_t task, int worker) {
        CHECK(worker < threads);
        ++runs[static_cast<std::size_t>(task)];
      });
      for (const std::atomic<int>& count : runs) CHECK(count == 1);
    }
  }
}

TEST_CASE("many short loops on more threads than cores end") {
  ThreadPool pool(2 * static_cast<int>(std::thread::hardware_concurrency()) + 1);
  std::atomic<std::int64_t> total{0};
  for (int loop = 0; loop < 2000; ++loop) pool.run(5, [&](std::int64_t, int) { ++total; });
  CHECK(total == 10000);
}

// Loops of a few instructions end before most of those called have woken up: who comes late must find nothing to do.
TEST_CASE("a worker that wakes up late takes no part in a loop that has ended") {
  for (int threads : {2, 9, 40}) {
    ThreadPool pool(threads);
    std::vector<std::int64_t> by_worker(static_cast<std::size_t>(threads));  // not atomic: a worker is one thread
    std::atomic<bool> is_open{false};
    std::atomic<int> late{0};
    std::int64_t wanted = 0;
    for (int loop = 0; loop < 3000; ++loop) {
      const std::int64_t tasks = loop % (2 * threads) + 1;
      is_open = true;
      pool.run(tasks, [&](std::int64_t task, int worker) {
        if (!is_open) ++late;
        for (volatile int spin = 0; spin < (task == 0 ? 0 : loop % 500);) spin = spin + 1;
        ++by_worker[static_cast<std::size_t>(worker)];
      });
      is_open = false;
      wanted += tasks;
    }
    CHECK(late == 0);
    CHECK(std::accumulate(by_worker.begin(), by_worker.end(), std::int64_t{0}) == wanted);
  }
}

TEST_CASE("a loop wakes no more workers than it has tasks for") {
  ThreadPool pool(40);
  std::vector<std::atomic<int>> by_worker(40);
  for (int loop = 0; loop < 200; ++loop) {
    pool.run(3, [&](std::int64_t, int worker) {
      ++by_worker[static_cast<std::size_t>(worker)];
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    });
  }
  for (std::size_t worker = 3; worker < by_worker.size(); ++worker) CHECK(by_worker[worker] == 0);
}

TEST_CASE("tasks of a few nodes are taken by as many workers, whosever neighbours they are") {
  for (int nodes : {2, 5}) {
    ThreadPool pool(4 * nodes, nodes);
    for (int loop = 0; loop < 300; ++loop) {
      std::vector<std::int64_t> tasks(static_cast<std::size_t>(nodes));
      tasks[static_cast<std::size_t>(loop % nodes)] = loop % 17 + 1;
      std::atomic<std::int64_t> done{0};
      pool.run_on_nodes({tasks.data(), tasks.size()}, [&](int node, std::int64_t, int) {
        CHECK(node == loop % nodes);
        ++done;
      });
      CHECK(done == loop % 17 + 1);
    }
  }
}

TEST_CASE("an exception reaches the caller and the pool stays usable") {
  for (int threads : {1, 4}) {
    ThreadPool pool(threads);
    std::atomic<int> started{0};
    CHECK_THROWS_AS(pool.run(100000,
                             [&](std::int64_t task, int) {
                               ++started;
                               if (task == 3) throw std::domain_error("three");
                             }),
                    std::domain_error);
    CHECK(started < 100000);
    std::atomic<int> after{0};
    pool.run(10, [&](std::int64_t, int) { ++after; });
    CHECK(after == 10);
  }
}

TEST_CASE("a token stops a loop between tasks") {
  for (int threads : {1, 4}) {
    ThreadPool pool(threads);
    CancelToken token;
    std::atomic<int> done{0};
    CHECK_THROWS_AS(pool.run(
                        1000000,
                        [&](std::int64_t, int) {
                          if (++done == 20) token.cancel();
                        },
                        &token),
                    Cancelled);
    CHECK(done < 1000000);
    const CancelToken expired(0.0);
    CHECK_THROWS_AS(pool.run(1, [](std::int64_t, int) {}, &expired), DeadlineExceeded);
  }
}

TEST_CASE("an impossible thread count is refused") {
  CHECK_THROWS_WITH_AS(ThreadPool(0), doctest::Contains("thread count 0"), std::runtime_error);
  CHECK_THROWS_AS(ThreadPool(ThreadPool::kMaxThreads + 1), InvalidArgument);
}

}  // namespace
}  // namespace kt_expert
