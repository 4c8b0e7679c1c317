#include "kt_expert/thread_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
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
