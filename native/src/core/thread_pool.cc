#include "kt_expert/thread_pool.h"

#include <chrono>
#include <string>

#include "kt_expert/error.h"

namespace kt_expert {
namespace {

// Long enough to bridge the gap between two loops of one forward, short enough that an oversubscribed machine
// loses nothing to waiting workers.
constexpr std::chrono::microseconds kSpinLimit{50};

}  // namespace

ThreadPool::ThreadPool(int threads) {
  if (threads < 1 || threads > kMaxThreads) {
    throw InvalidArgument("thread count " + std::to_string(threads) + " is outside [1, " + std::to_string(kMaxThreads) +
                          "]; give the number of physical cores");
  }
  workers_.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int worker = 1; worker < threads; ++worker) {
      workers_.emplace_back([this, worker] { worker_loop(worker); });
    }
  } catch (...) {
    stop();  // a limit on processes was met; those that run must not outlive this object
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
    generation_.fetch_add(1);
  }
  work_ready_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& body, const CancelToken* token) {
  if (token != nullptr) token->check();
  if (tasks <= 0) return;
  std::lock_guard<std::mutex> one_loop(run_mutex_);
  if (tasks == 1 || workers_.empty()) {
    for (std::int64_t task = 0; task < tasks; ++task) {
      if (token != nullptr) token->check();
      body(task, 0);
    }
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    body_ = &body;
    token_ = token;
    tasks_ = tasks;
    failure_ = nullptr;
    abandon_.store(false);
    next_task_.store(0);
    active_workers_ = static_cast<int>(workers_.size());
    generation_.fetch_add(1);
  }
  work_ready_.notify_all();
  drain(0);
  std::unique_lock<std::mutex> lock(mutex_);
  work_done_.wait(lock, [this] { return active_workers_ == 0; });
  body_ = nullptr;
  if (failure_) std::rethrow_exception(failure_);
}

void ThreadPool::drain(int worker) {
  while (!abandon_.load(std::memory_order_relaxed)) {
    const std::int64_t task = next_task_.fetch_add(1);
    if (task >= tasks_) return;
    try {
      if (token_ != nullptr) token_->check();
      (*body_)(task, worker);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      abandon_.store(true);
    }
  }
}

bool ThreadPool::wait_for_work(std::uint64_t seen_generation) {
  const auto give_up = std::chrono::steady_clock::now() + kSpinLimit;
  while (generation_.load(std::memory_order_acquire) == seen_generation) {
    if (std::chrono::steady_clock::now() >= give_up) {
      std::unique_lock<std::mutex> lock(mutex_);
      work_ready_.wait(lock, [&] { return generation_.load() != seen_generation; });
      break;
    }
    __builtin_ia32_pause();
  }
  return !stopping_.load();
}

void ThreadPool::worker_loop(int worker) {
  std::uint64_t seen = 0;
  while (wait_for_work(seen)) {
    {
      // The lock orders this read after the writes of run(): a spinning worker may see the new generation early.
      std::lock_guard<std::mutex> lock(mutex_);
      seen = generation_.load();
      if (stopping_.load()) return;
    }
    drain(worker);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--active_workers_ == 0) work_done_.notify_all();
  }
}

}  // namespace kt_expert
