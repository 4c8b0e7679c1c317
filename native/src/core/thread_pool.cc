#include "kt_expert/thread_pool.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <string>
#include <utility>

#include "kt_expert/error.h"
#include "kt_expert/topology.h"

namespace kt_expert {
namespace {

// Long enough to bridge the gap between two loops of one forward, short enough that an oversubscribed machine
// loses nothing to waiting workers.
constexpr std::chrono::microseconds kSpinLimit{50};

}  // namespace

ThreadPool::ThreadPool(int threads, int nodes)
    : ThreadPool(threads, std::vector<std::vector<int>>(static_cast<std::size_t>(std::max(0, nodes)))) {}

ThreadPool::ThreadPool(int threads, std::vector<std::vector<int>> node_cpus)
    : size_(threads), nodes_(static_cast<int>(node_cpus.size())), node_cpus_(std::move(node_cpus)) {
  if (threads < 1 || threads > kMaxThreads) {
    throw InvalidArgument("thread count " + std::to_string(threads) + " is outside [1, " + std::to_string(kMaxThreads) +
                          "]; give the number of physical cores");
  }
  if (nodes_ < 1 || nodes_ > kMaxMemoryNodes) {
    throw InvalidArgument("the number of memory nodes is " + std::to_string(nodes_) + ", expected a value in [1, " +
                          std::to_string(kMaxMemoryNodes) + "]");
  }
  counters_ = std::make_unique<TaskCounter[]>(static_cast<std::size_t>(nodes_));
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

// The node in which the worker's place lies when all nodes' cores are laid end to end; without cores, nodes count
// alike.
int ThreadPool::node_of(int worker) const {
  const auto weight = [](const std::vector<int>& cpus) {
    return std::max<std::int64_t>(1, static_cast<std::int64_t>(cpus.size()));
  };
  std::int64_t total = 0;
  for (const std::vector<int>& cpus : node_cpus_) total += weight(cpus);
  const std::int64_t place = worker * total / size_;
  int node = 0;
  for (std::int64_t end = weight(node_cpus_[0]); place >= end;
       end += weight(node_cpus_[static_cast<std::size_t>(node)])) {
    ++node;
  }
  return node;
}

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
  const std::array<std::int64_t, kMaxMemoryNodes> counts = {tasks};
  run_on_nodes(
      {counts.data(), static_cast<std::size_t>(nodes_)},
      [&body](int, std::int64_t task, int worker) { body(task, worker); }, token);
}

void ThreadPool::run_on_nodes(Span<const std::int64_t> tasks, const std::function<void(int, std::int64_t, int)>& body,
                              const CancelToken* token) {
  if (static_cast<int>(tasks.size()) != nodes_) {
    throw InvalidArgument("tasks for " + std::to_string(tasks.size()) + " memory nodes on a pool of " +
                          std::to_string(nodes_) + "; load the weights for this engine's nodes");
  }
  if (token != nullptr) token->check();
  std::int64_t total = 0;
  for (const std::int64_t count : tasks) total += count;
  if (total <= 0) return;
  std::lock_guard<std::mutex> one_loop(run_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    body_ = &body;
    token_ = token;
    failure_ = nullptr;
    abandon_.store(false);
    for (int node = 0; node < nodes_; ++node) {
      counters_[static_cast<std::size_t>(node)].tasks = tasks[static_cast<std::size_t>(node)];
      counters_[static_cast<std::size_t>(node)].next.store(0);
    }
    if (total > 1 && !workers_.empty()) {
      active_workers_ = static_cast<int>(workers_.size());
      generation_.fetch_add(1);
    }
  }
  if (total > 1) work_ready_.notify_all();
  {
    const PinnedThread near(cpus_of(0));
    drain(0);
  }
  std::unique_lock<std::mutex> lock(mutex_);
  work_done_.wait(lock, [this] { return active_workers_ == 0; });
  body_ = nullptr;
  if (failure_) std::rethrow_exception(failure_);
}

void ThreadPool::drain(int worker) {
  const int own = node_of(worker);
  for (int step = 0; step < nodes_; ++step) {
    if (!drain_node((own + step) % nodes_, worker)) return;
  }
}

// False once the loop is abandoned.
bool ThreadPool::drain_node(int node, int worker) {
  TaskCounter& counter = counters_[static_cast<std::size_t>(node)];
  while (!abandon_.load(std::memory_order_relaxed)) {
    const std::int64_t task = counter.next.fetch_add(1);
    if (task >= counter.tasks) return true;
    try {
      if (token_ != nullptr) token_->check();
      (*body_)(node, task, worker);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      abandon_.store(true);
    }
  }
  return false;
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
  const PinnedThread near(cpus_of(worker));
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
